// Keyframes of a camera: amounts of the axes at some frames, and what lies between them.

import { cameraOf, pathOf, still } from "./camera.js";
import { $, h, onClick, partsOf, replace } from "./dom.js";

const ease = (share) => share * share * (3 - 2 * share);

/** Amounts at a frame. keys: [frame, amounts] in order, one at least. */
export function amountsAt(keys, frame) {
  const after = keys.findIndex(([at]) => at >= frame);
  if (after === 0) return { ...keys[0][1] };
  if (after < 0) return { ...keys.at(-1)[1] };
  const [[low, a], [high, b]] = [keys[after - 1], keys[after]];
  const share = ease((frame - low) / (high - low));
  return Object.fromEntries(Object.keys(a).map((axis) =>
    [axis, Number((a[axis] + share * (b[axis] - a[axis])).toFixed(4))]));
}

/** A trajectory as the service takes it. size: height and width. */
export function trajectoryOf(keys, frames, size) {
  const poses = Array.from({ length: frames }, (_, frame) => {
    const pose = pathOf(cameraOf(amountsAt(keys, frame)), new Map(), 2).at(-1);
    return [0, 4, 8].map((row) => pose.slice(row, row + 4));
  });
  return { format: "mv2v-camera", version: 1, size, poses };
}

export class Keyframes {
  /**
   * frames: of a turn. player: that keys are set along. current: () amounts of the dial, of which
   * the first key is made. onchange: () the keys, or which one is picked, are others.
   */
  constructor(frames, player, current, onchange) {
    Object.assign(this, { frames, player, current, onchange });
    this.keys = new Map(); // frame: amounts
    this.picked = null;
    this.parts = partsOf($("keyframes"));
    onClick($("keyframes"), {
      add: () => this.add(), remove: () => this.remove(), clear: () => this.clear(),
    });
    this.#show();
  }

  get sorted() {
    return [...this.keys].sort(([a], [b]) => a - b);
  }

  get isOn() {
    return this.keys.size > 0;
  }

  /** The amounts that are edited; null without keys. */
  get amounts() {
    return this.isOn ? this.keys.get(this.picked) : null;
  }

  /** A key where the player stands. amounts: of the first one, which starts at the source's own. */
  add() {
    const frame = Math.min(this.frames - 1, this.player.frame);
    if (!this.isOn && frame > 0) this.keys.set(0, still());
    const amounts = this.isOn && !(this.keys.size === 1 && this.keys.has(0))
      ? amountsAt(this.sorted, frame) : { ...this.current() };
    this.keys.set(frame, amounts);
    this.picked = frame;
    this.#changed();
  }

  edit(amounts) {
    this.keys.set(this.picked, amounts);
  }

  remove() {
    this.keys.delete(this.picked);
    this.picked = this.sorted.at(-1)?.[0] ?? null;
    this.#changed();
  }

  clear() {
    this.keys.clear();
    this.picked = null;
    this.#changed();
  }

  #changed(focus = null) {
    this.#show();
    if (focus !== null) this.parts.track.querySelector(`[data-frame="${focus}"]`).focus();
    else if (document.activeElement?.hidden) this.parts.add.focus();
    this.onchange();
  }

  #show() {
    const { track, remove, clear } = this.parts;
    replace(track, this.sorted.map(([frame]) => h("button", {
      type: "button", class: "key", "data-frame": frame, "aria-pressed": frame === this.picked,
      "aria-label": `Key at frame ${frame + 1}; arrow keys move it`,
      vars: { "--share": frame / Math.max(1, this.frames - 1) },
      onclick: () => this.#pick(frame), onkeydown: (event) => this.#move(event, frame),
    })));
    track.hidden = remove.hidden = clear.hidden = !this.isOn;
  }

  #pick(frame) {
    this.picked = frame;
    this.player.seek(frame);
    this.#changed(frame);
  }

  #move(event, frame) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Delete") {
      event.preventDefault();
      this.picked = frame;
      this.remove();
      return;
    }
    const next = frame + (step ?? 0);
    if (!step || next < 0 || next >= this.frames || this.keys.has(next)) return;
    event.preventDefault();
    this.keys.set(next, this.keys.get(frame));
    this.keys.delete(frame);
    this.picked = next;
    this.player.seek(next);
    this.#changed(next);
  }
}
