// What a turn remembered, and what it cost, read from its report.

import { h } from "./dom.js";
import { flops, percent, plural, seconds, stageWords } from "./format.js";

const KINDS = { target: "Target", source: "Source", memory: "Memory" };
const RANKINGS = {
  fov: "Scored by the share of the new view that each has seen",
};

const sum = (values) => Object.values(values).reduce((a, b) => a + b, 0);
const count = (value) => value.toLocaleString("en");

/** The share of a remembered video's latent frames that fused into others, at any depth. */
function mergedShare(report, name, latentFrames) {
  const frames = new Set();
  for (const row of report.merged_frames ?? []) {
    for (const frame of row.frames[name] ?? []) frames.add(frame);
  }
  return frames.size / latentFrames;
}

const listed = (name, rows) => h("dl", { class: name }, rows.map(([term, words]) =>
  h("div", null, h("dt", null, term), h("dd", null, words))));

/** A bar of 100 %: parts of a whole, each with a name and a number in words. */
function stackedBar(parts, words) {
  const total = parts.reduce((all, part) => all + part.value, 0) || 1;
  return [
    h("div", { class: "stack", "aria-hidden": "true" },
      parts.filter((part) => part.value > 0).map((part, index) =>
        h("span", { class: `shade-${index % 5}`, vars: { "--share": part.value / total } }))),
    listed("legend", parts.map(({ name, value }, index) =>
      [[h("span", { class: `swatch shade-${index % 5}` }), name], words(value)])),
  ];
}

function retrievedRow(row, index, report, { noun, latentFrames, open }) {
  const { turn } = row;
  const tokens = report.plan.memory_tokens[index];
  const merged = mergedShare(report, `${noun} ${turn}`, latentFrames);
  const name = `${noun === "turn" ? "Turn" : "Window"} ${turn}`;
  return h("li", { "data-turn": turn },
    h("div", { class: "recall-head" },
      open ? h("button", { type: "button", class: "link", onclick: () => open(turn) }, name)
        : h("span", null, name),
      h("span", { class: "score" }, row.score.toFixed(3))),
    h("meter", { value: row.score, "aria-hidden": "true" }),
    h("p", { class: "fine" }, row.encoder === "history"
      ? `in the history (${row.tokenizer.replaceAll("x", "×")})`
      : `${plural(tokens, "token")} (${row.tokenizer.replaceAll("x", "×")}), `
        + `${percent(merged)} merged`));
}

/** Which videos a turn or a window remembered, and why. */
function memoryOf(report, settings) {
  const { retrieved, num_candidates: candidates, reason, lost } = report.memory;
  const noun = settings.noun;
  const found = retrieved.length
    ? h("ul", { class: "recall" },
        retrieved.map((row, index) => retrievedRow(row, index, report, settings)))
    : h("p", { class: "fine" }, reason ? `Nothing remembered: ${reason}.` : "Nothing remembered.");
  const words = [
    retrieved.length > 0 && RANKINGS[report.memory.ranking],
    candidates > 0 && `${retrieved.length} of ${plural(candidates, `earlier ${noun}`)} used`,
    lost && `Lost from the store: ${Object.values(lost).join("; ")}`,
  ].filter(Boolean);
  return [found, words.length > 0 && h("p", { class: "fine" }, `${words.join("; ")}.`)];
}

/** The memory of a finished turn. settings: {num_frames, open: (turn) shows that turn}. */
export function memorySection(report, { numFrames, open }) {
  const latentFrames = 1 + (numFrames - 1) / 4; // the VAE's stride in time
  const title = h("h4", { class: "label" }, "Remembered");
  if (!report.windows) {
    return h("section", { class: "memory" }, title,
      memoryOf(report, { noun: "turn", latentFrames, open }));
  }
  return h("section", { class: "memory" }, title,
    h("p", { class: "fine" }, `${plural(report.num_windows, "window")} in `
      + `${plural(report.shots, "shot")}; each remembers windows before it.`),
    h("div", { class: "windows" }, report.windows.map((row) => h("details", { class: "window" },
      h("summary", null, `Window ${row.window}`,
        h("span", { class: "fine" }, ` frames ${row.frames[0] + 1}–${row.frames[1]}`)),
      memoryOf(row, { noun: "window", latentFrames, open: null })))));
}

function mergeFacts({ tokens, merges }) {
  if (!merges.length) return [];
  const lengths = [tokens, ...merges.map((merge) => merge.tokens_after)];
  return [
    ...merges.map(({ block, frames, of }) =>
      [`Merged at block ${block}`, `${frames} of ${of} frames`]),
    ["Tokens after merging", lengths.map(count).join(" → ")],
  ];
}

/** What a finished turn cost: one line, and everything under it. */
export function costSection(report) {
  const total = sum(report.seconds);
  const rows = report.windows ?? [report];
  const tokens = Math.max(...rows.map((row) => row.plan.tokens));
  const largest = rows.find((row) => row.plan.tokens === tokens);
  const forward = largest.flops_per_forward;
  const facts = [
    ["Steps", `${report.num_inference_steps}, guidance ${report.guidance_scale}, `
      + `seed ${report.seed}`],
    ...mergeFacts(largest.plan),
    ["One forward", flops(sum(forward))],
    report.flops !== report.flops_exact && ["Without shortcuts", flops(report.flops_exact)],
    report.approximations.length > 0 && ["Approximate", report.approximations.join("; ")],
    ["Model", `${report.checkpoint} on ${report.device}, ${report.dtype}`],
  ].filter(Boolean);
  return h("details", { class: "cost" },
    h("summary", null,
      h("span", { class: "label" }, "Cost"),
      h("span", { class: "cost-line" },
        `${seconds(total)} · ${plural(tokens, "token")} · ${flops(report.flops)}`)),
    h("h5", null, "Seconds per stage"),
    stackedBar(Object.entries(report.seconds).map(([stage, value]) =>
      ({ name: stageWords(stage), value })), seconds),
    h("h5", null, report.windows ? "Tokens of the largest window" : "Tokens"),
    stackedBar(Object.entries(largest.plan.tokens_by_kind).map(([kind, value]) =>
      ({ name: KINDS[kind] ?? kind, value })), count),
    listed("facts", facts));
}
