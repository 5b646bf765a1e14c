// Which part of a long video the turns are made of.

import { $, h, replace, setVars } from "./dom.js";
import { busy, button, clear, problem } from "./notices.js";

export class PartPicker {
  /** numFrames: that a turn has; onlook: (frame of the video, or null); onuse: (window). */
  constructor(numFrames, { onlook, onuse }) {
    Object.assign(this, { numFrames, onlook, onuse });
    this.root = $("part");
  }

  /** Hidden where the model sees the whole video, or as many frames as it has. */
  show(session) {
    const { source_frames: seen, frames, fps } = session;
    const last = frames - this.numFrames;
    if (session.kind !== "views" || last <= 0 || !seen) {
      replace(this.root);
      return;
    }
    const state = h("div");
    const words = h("output", { class: "fine" });
    const isRun = seen.at(-1) - seen[0] === seen.length - 1;
    const range = h("input", {
      type: "range", class: "scrubber part-range", min: 0, max: last, step: 1, value: seen[0],
      "aria-label": "First frame of the part", oninput: () => look(true),
    });
    const use = button("Use this part", () => {
      clear(state);
      busy(use, () => this.onuse(range.value), (error) => problem(state, error));
    });
    const even = button("Spread over all", () => {
      clear(state);
      busy(even, () => this.onuse("even"), (error) => problem(state, error));
    });
    even.hidden = !isRun;
    const look = (isMoved) => {
      const start = Number(range.value);
      const end = start + this.numFrames;
      const clock = (frame) => `${(frame / fps).toFixed(1)} s`;
      words.textContent = `Frames ${start + 1}–${end} of ${frames}, ${clock(start)} to ${clock(end)}`;
      range.setAttribute("aria-valuetext", words.textContent);
      setVars(range, { "--share": start / last, "--length": this.numFrames / frames });
      use.hidden = isRun && start === seen[0];
      if (isMoved) this.onlook(start);
    };
    replace(this.root, h("div", { class: "part" },
      h("span", { class: "label" }, "Part of the video"), range, words,
      h("div", { class: "row" }, use, even)), state);
    look(false);
  }
}
