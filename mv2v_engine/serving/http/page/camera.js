// Camera moves: how they are written, and the path that one takes, for the preview.
//
// A pose is [R | t] as 12 numbers, row by row: camera-to-world, OpenCV axes (x right, y down,
// z forward), metres, relative to the source's first frame. The engine's own are in
// mv2v_engine/camera/trajectories.py; moves are sent by name and made there.

import { signed } from "./format.js";

const SUBJECT_DISTANCE = 4; // metres; what arcs turn about
/** In which moves are made that add up, however they are written. */
const ORDER = ["arc", "translate", "crane", "zoom", "pan", "tilt", "static"];

/** The free moves. positive, negative: what the directions mean. */
export const AXES = {
  arc: { name: "Arc", unit: "°", limit: 120, step: 1, positive: "right", negative: "left" },
  pan: { name: "Pan", unit: "°", limit: 90, step: 1, positive: "right", negative: "left" },
  tilt: { name: "Tilt", unit: "°", limit: 45, step: 1, positive: "up", negative: "down" },
  zoom: { name: "Zoom", unit: " m", limit: 4, step: 0.1, positive: "in", negative: "out" },
  slide: { name: "Slide", unit: " m", limit: 4, step: 0.1, positive: "right", negative: "left" },
  lift: { name: "Lift", unit: " m", limit: 3, step: 0.1, positive: "up", negative: "down" },
};

export const IDENTITY = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0];
const radians = (degrees) => (degrees * Math.PI) / 180;

function compose(a, b) {
  const result = new Array(12);
  for (let row = 0; row < 3; row += 1) {
    for (let column = 0; column < 4; column += 1) {
      let sum = column === 3 ? a[row * 4 + 3] : 0;
      for (let k = 0; k < 3; k += 1) sum += a[row * 4 + k] * b[k * 4 + column];
      result[row * 4 + column] = sum;
    }
  }
  return result;
}

const moved = (x, y, z) => [1, 0, 0, x, 0, 1, 0, y, 0, 0, 1, z];

function yaw(degrees) {
  const [c, s] = [Math.cos(radians(degrees)), Math.sin(radians(degrees))];
  return [c, 0, s, 0, 0, 1, 0, 0, -s, 0, c, 0];
}

function pitch(degrees) {
  const [c, s] = [Math.cos(radians(degrees)), Math.sin(radians(degrees))];
  return [1, 0, 0, 0, 0, c, -s, 0, 0, s, c, 0];
}

function arc(degrees, radius = SUBJECT_DISTANCE) {
  const angle = radians(degrees);
  const around = moved(Math.sin(angle) * radius, 0, (1 - Math.cos(angle)) * radius);
  return compose(around, yaw(-degrees));
}

function crane(rise, progress) {
  const turn = -Math.atan2(rise, SUBJECT_DISTANCE) * (180 / Math.PI);
  return compose(moved(0, -rise * progress, 0), pitch(turn * progress));
}

// (progress from 0 to 1, amounts) -> pose
const MOVES = {
  static: () => IDENTITY,
  pan: (p, degrees) => yaw(p * degrees),
  tilt: (p, degrees) => pitch(p * degrees),
  zoom: (p, metres) => moved(0, 0, p * metres),
  translate: (p, x, y, z) => moved(p * x, p * y, p * z),
  crane: (p, rise) => crane(rise, p),
  arc: (p, degrees, radius) => arc(p * degrees, radius),
};

function sampled(pose, count) {
  return Array.from({ length: count }, (_, index) => pose(count > 1 ? index / (count - 1) : 0));
}

export const still = () => Object.fromEntries(Object.keys(AXES).map((axis) => [axis, 0]));

/** What to ask the service for: a move, or several that add up. */
export function cameraOf(amounts) {
  const used = Object.keys(AXES).filter((axis) => amounts[axis] !== 0 && axis in MOVES);
  const moves = used.map((axis) => `${axis}:${amounts[axis]}`);
  const { slide, lift } = amounts;
  // y points down
  if (slide || lift) moves.push(`translate:${slide},${-lift || 0},0`);
  return moves.join("+") || "static";
}

const partsOf = (camera) => String(camera).split(/ *\+ *(?=[A-Za-z_])/);

/** The poses of one move or preset; null if it is unknown here. */
function moveOf(camera, presets, count) {
  if (presets.has(camera)) {
    const poses = presets.get(camera);
    const last = poses.length - 1;
    return sampled((p) => poses[Math.round(p * last)].flat(), Math.min(count, poses.length));
  }
  const [kind, text] = camera.split(":");
  const amounts = text ? text.split(",").map(Number) : [];
  if (!(kind in MOVES) || amounts.some(Number.isNaN)) return null;
  return sampled((p) => MOVES[kind](p, ...amounts), count);
}

/**
 * The poses of a camera as it was asked for, at most `count` of them; null if it is unknown here.
 *
 * presets: by name, the poses that the service gave for each.
 */
export function pathOf(camera, presets, count = 17) {
  if (camera && typeof camera === "object") {
    const poses = (camera.poses ?? []).map((pose) => pose.flat());
    if (poses.length === 0) return null;
    const stride = Math.max(1, Math.floor((poses.length - 1) / (count - 1)));
    return poses.filter((_, index) => index % stride === 0 || index === poses.length - 1);
  }
  const place = (part) => ORDER.indexOf(part.split(/[:_]/)[0]);
  const paths = partsOf(camera).sort((a, b) => place(a) - place(b))
    .map((part) => moveOf(part, presets, count));
  if (paths.includes(null)) return null;
  return paths.reduce((path, next) =>
    path.slice(0, next.length).map((pose, index) => compose(pose, next[index])));
}

/** A move in words: "Arc left 40°". */
export function axisWords(axis, amount) {
  const { name, unit, positive, negative } = AXES[axis];
  return `${name} ${amount < 0 ? negative : positive} ${signed(Math.abs(amount))}${unit}`;
}

export function amountsWords(amounts) {
  const used = Object.keys(AXES).filter((axis) => amounts[axis] !== 0);
  return used.map((axis) => axisWords(axis, amounts[axis])).join(", ") || "The source's own camera";
}

/** What a turn's request is called on the page. */
export function requestWords(request) {
  if (request.prompt && !request.camera) return request.prompt;
  const camera = request.camera;
  if (camera && typeof camera === "object") return camera.name ?? "Camera path";
  return partsOf(camera).map(moveWords).join(", ");
}

function moveWords(camera) {
  const [kind, text] = camera.split(":");
  if (kind in AXES && text && !text.includes(",")) return axisWords(kind, Number(text));
  if (kind === "translate") {
    const [x, y, z] = text.split(",").map(Number);
    return amountsWords({ ...still(), slide: x, lift: -y, zoom: z });
  }
  if (kind === "static") return "The source's own camera";
  if (text) return `${kind} ${text}`;
  return presetWords(kind);
}

export function presetWords(name) {
  const words = name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}
