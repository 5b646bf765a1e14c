// Camera moves in plain words: "move left and look down a little" becomes amounts of the axes.

import { AXES, still } from "./camera.js";

// what a clause speaks of, the first that fits; each takes a direction's word and gives its axis
const KINDS = [
  [/\b(orbit|arc|circle|around|swing)/, { left: ["arc", -40], right: ["arc", 40] }],
  [/\b(look|pan|turn|rotate|tilt|face|aim)/, {
    left: ["pan", -20], right: ["pan", 20], up: ["tilt", 12], down: ["tilt", -12],
  }],
  [/\b(zoom|dolly|push|pull|approach|closer|nearer)/, {
    in: ["zoom", 1.5], out: ["zoom", -1.5],
  }],
  [/\b(rise|raise|crane|lift|climb|sink|lower|descend)/, {
    up: ["lift", 0.8], down: ["lift", -0.8],
  }],
  [/\b(move|go|slide|truck|fly|step|drift|shift|walk|track|come)/, {
    left: ["slide", -1], right: ["slide", 1], up: ["lift", 0.8], down: ["lift", -0.8],
    in: ["zoom", 1.5], out: ["zoom", -1.5],
  }],
];
const DIRECTIONS = {
  left: /\bleft/, right: /\bright/,
  in: /\b(in|forwards?|ahead|closer|nearer|towards?|push|approach)\b/,
  out: /\b(out|backwards?|back|away|pull)\b/,
  up: /\b(up|upwards?|higher|rise|raise|climb|lift)\b/,
  down: /\b(down|downwards?|lower|sink|descend)\b/,
};
const DEFAULTS = { orbit: "right", arc: "right", circle: "right", swing: "right", zoom: "in",
  dolly: "in", crane: "up" };
const STRENGTHS = [[/\b(slightly|little|bit|gently)\b/, 0.5], [/\b(far|lot|much|wide|way)\b/, 2]];

/** {amounts, unread}: what was understood, and the clauses that were not. */
export function parseMoves(text) {
  const amounts = still();
  const unread = [];
  let kind = null;
  for (const clause of text.toLowerCase().split(/[,;+]|\band\b|\bthen\b|\bwhile\b/)) {
    const words = clause.trim();
    if (!words || /^(stay|stand|hold|keep) ?(still)?$|^still$/.test(words)) continue;
    const found = KINDS.find(([pattern]) => pattern.test(words));
    // "look left and down": the second clause goes on with the first one's verb
    kind = found ?? kind ?? KINDS.at(-1);
    const direction = directionOf(words, kind[1]);
    if (!direction) {
      unread.push(words);
      continue;
    }
    const [axis, usual] = kind[1][direction];
    const number = words.match(/\d+(\.\d+)?/);
    const strength = STRENGTHS.find(([pattern]) => pattern.test(words))?.[1] ?? 1;
    const amount = number ? Math.sign(usual) * Number(number[0]) : usual * strength;
    const { limit } = AXES[axis];
    amounts[axis] = Math.max(-limit, Math.min(limit, amounts[axis] + amount));
  }
  return { amounts, unread };
}

function directionOf(words, known) {
  const said = Object.keys(DIRECTIONS).find(
    (name) => name in known && DIRECTIONS[name].test(words));
  if (said) return said;
  const verb = Object.keys(DEFAULTS).find((word) => words.includes(word));
  return verb && DEFAULTS[verb] in known ? DEFAULTS[verb] : null;
}
