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
  [/\b(ris(e|ing)|rais|crane|lift|climb|sink|lower|descend)/, {
    up: ["lift", 0.8], down: ["lift", -0.8],
  }],
  [/\b(move|go|slide|truck|fly|step|drift|shift|walk|track|come)/, {
    left: ["slide", -1], right: ["slide", 1], up: ["lift", 0.8], down: ["lift", -0.8],
    in: ["zoom", 1.5], out: ["zoom", -1.5],
  }],
];
const DIRECTIONS = {
  left: /\bleft/, right: /\bright/,
  in: /\b((in|forwards?|ahead|closer|nearer|towards?)\b|push|approach)/,
  out: /\b((out|backwards?|back|away)\b|pull)/,
  up: /\b((up|upwards?|higher)\b|ris(e|ing)|rais|climb|lift)/,
  down: /\b((down|downwards?)\b|lower|sink|descend)/,
};
const DEFAULTS = { orbit: "right", arc: "right", circle: "right", swing: "right", zoom: "in",
  dolly: "in", crane: "up" };
const STRENGTHS = [[/\b(slightly|little|bit|gently)\b/, 0.5], [/\b(far|lot|much|wide|way)\b/, 2]];

const NUMBERS = { one: 1, two: 2, three: 3, four: 4, five: 5, ten: 10, fifteen: 15, twenty: 20,
  thirty: 30, forty: 40, "forty-five": 45, fifty: 50, sixty: 60, ninety: 90 };
const NUMBER = new RegExp(
  `(-?\\d+(?:\\.\\d+)?|\\b(?:${Object.keys(NUMBERS).reverse().join("|")})\\b) *([a-z°%]*)`);
// of what kind of axis, and how much of its unit
const UNITS = { "°": ["°", 1], deg: ["°", 1], degree: ["°", 1], degrees: ["°", 1], m: [" m", 1],
  metre: [" m", 1], metres: [" m", 1], meter: [" m", 1], meters: [" m", 1], cm: [" m", 0.01],
  ft: [" m", 0.3048], foot: [" m", 0.3048], feet: [" m", 0.3048] };
// with which a clause means another thing than its verb and its direction say
const OTHER = new RegExp("\\b(not|no|never|don.?t|without|half|quarter|twice|double|hundred)\\b"
  + "|\\d *(%|(mm|x|px|s|sec\\w*|times|inch\\w*|rad\\w*|turns?|frames?)\\b)");
const STILL = /^((stay|stand|hold|keep) ?(still)?|still|(don.?t|do not) move)$/;

/** {amounts, unread, limited}: what was understood, the clauses that were not, axes at their ends. */
export function parseMoves(text) {
  const amounts = still();
  const [unread, limited] = [[], []];
  let kind = null;
  for (const clause of text.toLowerCase().split(/[,;+]|\band\b|\bthen\b|\bwhile\b/)) {
    const words = clause.trim();
    if (!words || STILL.test(words)) continue;
    const found = KINDS.find(([pattern]) => pattern.test(words));
    // "look left and down": the second clause goes on with the first one's verb, if that fits
    const kinds = found ? [found] : [kind, KINDS.at(-1)].filter(Boolean);
    kind = kinds.find(([, known]) => directionOf(words, known)) ?? kinds[0];
    const direction = directionOf(words, kind[1]);
    const [axis, usual] = kind[1][direction] ?? [];
    const amount = axis && !OTHER.test(words) ? amountOf(words, usual, AXES[axis].unit) : NaN;
    if (Number.isNaN(amount)) {
      unread.push(words);
      continue;
    }
    const { limit } = AXES[axis];
    const wanted = amounts[axis] + amount;
    amounts[axis] = Math.max(-limit, Math.min(limit, wanted));
    if (amounts[axis] !== wanted) limited.push(axis);
  }
  return { amounts, unread, limited };
}

/** How much of an axis; NaN where it is said in a unit of another. */
function amountOf(words, usual, unit) {
  const [, number, name] = words.match(NUMBER) ?? [];
  if (!number) return usual * (STRENGTHS.find(([pattern]) => pattern.test(words))?.[1] ?? 1);
  const [of, share] = UNITS[name] ?? [unit, 1];
  const amount = Math.sign(usual) * share * Number(NUMBERS[number] ?? number);
  return of === unit ? Number(amount.toFixed(2)) : NaN;
}

function directionOf(words, known) {
  const said = Object.keys(DIRECTIONS).filter((name) => DIRECTIONS[name].test(words));
  if (said.length) return said.find((name) => name in known);
  const verb = Object.keys(DEFAULTS).find((word) => words.includes(word));
  return DEFAULTS[verb] in known ? DEFAULTS[verb] : undefined;
}
