// Videos that play as one: one clock, one scrubber, every seek to the middle of a frame.

import { h, replace, setVars } from "./dom.js";
import { icon } from "./icons.js";

const RATES = [1, 0.5, 0.25];

export class Player {
  /** root: where its controls go; onframe: (frame), whenever another one is shown. */
  constructor(root, onframe) {
    this.videos = new Map();
    this.pending = new Map(); // frames to seek to once a seek under way is done
    this.onframe = onframe;
    this.fps = 1;
    this.frames = 1;
    this.frame = 0;
    this.isPlaying = false;
    this.run = 0; // which playing it is: an older one's clock stops by itself
    this.toggleButton = this.#button("play", "Play all", () => this.toggle(), "Space");
    this.toggleButton.classList.add("primary", "round");
    this.rateButton = h("button", {
      type: "button", class: "button small rate", onclick: () => this.#nextRate(),
    });
    this.range = h("input", {
      type: "range", min: 0, max: 0, step: 1, value: 0, class: "scrubber", "aria-label": "Frame",
      oninput: () => this.seek(Number(this.range.value)),
    });
    this.readout = h("output", { class: "readout" });
    replace(root,
      this.#button("previous", "Previous frame", () => this.step(-1), ","),
      this.toggleButton,
      this.#button("next", "Next frame", () => this.step(1), "."),
      this.range, this.readout, this.rateButton);
    this.rate = 1;
    this.#showRate();
  }

  /** key: that does the same where nothing else takes it. */
  #button(name, label, onclick, key = null) {
    return h("button", {
      type: "button", class: "icon", "aria-label": label, title: key, onclick,
    }, icon(name));
  }

  /** What is played: so many frames at a rate. */
  setTimeline(fps, frames) {
    this.pause();
    Object.assign(this, { fps, frames, frame: 0 });
    this.range.max = frames - 1;
    this.#show(0);
  }

  clear() {
    this.pause();
    this.videos.clear();
    this.pending.clear();
  }

  add(id, video) {
    this.videos.set(id, video);
    const settle = () => {
      if (this.videos.get(id) !== video) return; // put aside before it was loaded
      video.playbackRate = this.rate;
      if (this.isPlaying) video.play().catch(ignoreInterruption);
      this.#seekVideo(video, this.frame);
    };
    if (video.readyState >= HTMLMediaElement.HAVE_METADATA) settle();
    else video.addEventListener("loadedmetadata", settle, { once: true });
    video.addEventListener("seeked", () => {
      const frame = this.pending.get(video);
      this.pending.delete(video);
      if (frame !== undefined) this.#seekVideo(video, frame);
    });
  }

  remove(id) {
    const video = this.videos.get(id);
    video?.pause();
    this.videos.delete(id);
    this.pending.delete(video);
  }

  /** Those that could be opened. */
  #ready() {
    return [...this.videos.values()].filter(
      (video) => video.readyState >= HTMLMediaElement.HAVE_METADATA && !video.error,
    );
  }

  /** The middle of a frame, since its edge may round to the one before. */
  #time(frame) {
    return (frame + 0.5) / this.fps;
  }

  #seekVideo(video, frame) {
    if (video.readyState < HTMLMediaElement.HAVE_METADATA) return;
    if (video.seeking) this.pending.set(video, frame);
    else video.currentTime = Math.min(this.#time(frame), video.duration);
  }

  #show(frame) {
    this.frame = frame;
    this.range.value = frame;
    setVars(this.range, { "--share": frame / Math.max(1, this.frames - 1) });
    const time = (frame / this.fps).toFixed(2);
    this.range.setAttribute(
      "aria-valuetext", `frame ${frame + 1} of ${this.frames}, ${time} seconds`);
    this.readout.textContent = `${frame + 1} / ${this.frames}`;
    this.onframe(frame);
  }

  seek(frame) {
    const held = Math.max(0, Math.min(this.frames - 1, Math.round(frame)));
    for (const video of this.#ready()) this.#seekVideo(video, held);
    this.#show(held);
  }

  /** One frame on or back, round the ends. */
  step(frames) {
    this.pause();
    this.seek((this.frame + frames + this.frames) % this.frames);
  }

  toggle() {
    if (this.isPlaying) this.pause();
    else this.play();
  }

  pause() {
    if (!this.isPlaying) return;
    this.isPlaying = false;
    this.run += 1;
    this.#showState();
    for (const video of this.videos.values()) video.pause();
    this.seek(this.frame);
  }

  play() {
    if (this.isPlaying || !this.#ready().length) return;
    this.isPlaying = true;
    this.#showState();
    this.#from(this.frame >= this.frames - 1 ? 0 : this.frame);
  }

  /** Plays on from a frame, all at once: after every one has found it. */
  async #from(frame) {
    const run = (this.run += 1);
    const videos = this.#ready();
    for (const video of videos) video.pause();
    this.seek(frame);
    await Promise.all(videos.map(settled));
    if (run !== this.run) return;
    for (const video of videos) video.play().catch(ignoreInterruption);
    requestAnimationFrame(() => this.#tick(run));
  }

  #tick(run) {
    if (run !== this.run) return;
    const videos = this.#ready();
    const leader = videos.reduce((a, b) => (b.duration > a.duration ? b : a), videos[0]);
    if (!leader) return this.pause();
    const end = this.frames / this.fps;
    if (leader.ended || leader.currentTime >= end) return void this.#from(0);
    const frame = Math.min(this.frames - 1, Math.floor(leader.currentTime * this.fps));
    if (frame !== this.frame) this.#show(frame);
    for (const video of videos) {
      const drift = Math.abs(video.currentTime - Math.min(leader.currentTime, video.duration));
      if (!video.seeking && drift > 1.5 / this.fps) video.currentTime = leader.currentTime;
    }
    requestAnimationFrame(() => this.#tick(run));
  }

  #showState() {
    const { toggleButton, isPlaying } = this;
    replace(toggleButton, icon(isPlaying ? "pause" : "play"));
    toggleButton.setAttribute("aria-label", isPlaying ? "Pause all" : "Play all");
  }

  #nextRate() {
    this.rate = RATES[(RATES.indexOf(this.rate) + 1) % RATES.length];
    for (const video of this.videos.values()) video.playbackRate = this.rate;
    this.#showRate();
  }

  #showRate() {
    this.rateButton.textContent = `${this.rate}×`;
    this.rateButton.setAttribute("aria-label", `Speed ${this.rate}, change it`);
  }
}

/** Once a video shows the frame that it was sent to; a broken one does not hold up the others. */
function settled(video) {
  if (!video.seeking) return Promise.resolve();
  return new Promise((resolve) => {
    for (const name of ["seeked", "error", "emptied"]) {
      video.addEventListener(name, resolve, { once: true });
    }
  });
}

/** play() fails where pause() comes before the first frame, which is no error. */
function ignoreInterruption(error) {
  if (error.name !== "AbortError") throw error;
}
