// Which part of a long video the turns are made of.

import { $, onClick, partsOf, replace, setVars } from "./dom.js";
import { attempt } from "./notices.js";

export class PartPicker {
  /** numFrames: that a turn has; onlook: (frame of the video, or null); onuse: (window). */
  constructor(numFrames, { onlook, onuse }) {
    Object.assign(this, { numFrames, onlook }, partsOf($("part")));
    this.range.addEventListener("input", () => this.#look(true));
    const take = (pressed, window) => attempt(pressed, this.state, () => onuse(window));
    onClick(this.body, {
      use: (pressed) => take(pressed, this.range.value),
      even: (pressed) => take(pressed, "even"),
    });
  }

  /** Hidden where the model sees the whole video, or as many frames as it has. */
  show(session) {
    const { source_frames: seen, frames } = session;
    replace(this.state);
    this.last = frames - this.numFrames;
    this.body.hidden = session.kind !== "views" || this.last <= 0 || !seen;
    if (this.body.hidden) return;
    this.session = session;
    this.range.max = this.last;
    this.range.value = seen[0];
    const isRun = seen.at(-1) - seen[0] === seen.length - 1;
    this.even.hidden = !isRun;
    this.used = isRun ? seen[0] : null; // the first frame of the part that it has
    this.#look(false);
  }

  #look(isMoved) {
    const { frames, fps } = this.session;
    const start = Number(this.range.value);
    const end = start + this.numFrames;
    const clock = (frame) => `${(frame / fps).toFixed(1)} s`;
    const words = `Frames ${start + 1}–${end} of ${frames}, ${clock(start)} to ${clock(end)}`;
    this.words.textContent = words;
    this.range.ariaValueText = words;
    setVars(this.range, { "--share": start / this.last, "--length": this.numFrames / frames });
    this.use.hidden = start === this.used;
    if (isMoved) this.onlook(start);
  }
}
