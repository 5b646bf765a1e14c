// Videos that play as one: one clock, one scrubber, every seek to the middle of a frame.

import { onClick, partsOf, setIcon, setVars } from "./dom.js";

export class Player {
  /** root: where its controls stand; onframe: (frame), whenever another one is shown. */
  constructor(root, onframe) {
    this.videos = new Map(); // id: {video, timing}
    this.pending = new Map(); // frames to seek to once a seek under way is done
    this.onframe = onframe;
    Object.assign(this, { fps: 1, frames: 1, frame: 0, loops: true });
    this.isPlaying = false;
    this.run = 0; // which playing it is: an older one's clock stops by itself
    this.parts = partsOf(root);
    const { range, speed, loop } = this.parts;
    onClick(root, {
      previous: () => this.step(-1),
      play: () => this.toggle(),
      next: () => this.step(1),
      loop: () => {
        this.loops = !this.loops;
        loop.ariaPressed = this.loops;
      },
    });
    speed.addEventListener("change", () => this.#rated());
    range.addEventListener("input", () => {
      const frame = Number(range.value); // before the pause shows its own
      this.pause();
      this.seek(frame);
    });
  }

  get rate() {
    return Number(this.parts.speed.value);
  }

  /** What is played: so many frames at a rate. */
  setTimeline(fps, frames) {
    this.pause();
    Object.assign(this, { fps, frames, frame: 0 });
    this.parts.range.max = frames - 1;
    this.#show(0);
  }

  clear() {
    this.pause();
    for (const id of [...this.videos.keys()]) this.remove(id);
  }

  /**
   * Plays a video along. timing: where its frames lie if they are not the timeline's own:
   * {time: (frame) in seconds, frame: (seconds), speed: of the video at speed 1}.
   */
  add(id, video, timing = null) {
    const settle = () => {
      if (this.videos.get(id)?.video !== video) return; // put aside before it was loaded
      video.playbackRate = this.rate * (timing?.speed() ?? 1);
      if (this.isPlaying) video.play().catch(ignoreInterruption);
      this.#seekVideo({ video, timing }, this.frame);
    };
    const known = this.videos.get(id)?.video === video;
    this.videos.set(id, { video, timing });
    if (video.readyState >= HTMLMediaElement.HAVE_METADATA) settle();
    else video.addEventListener("loadedmetadata", settle, { once: true });
    if (known) return;
    video.onseeked = () => {
      const frame = this.pending.get(video);
      this.pending.delete(video);
      if (frame !== undefined) this.#seekVideo({ video, timing }, frame);
    };
  }

  remove(id) {
    const entry = this.videos.get(id);
    this.videos.delete(id);
    if (!entry) return;
    entry.video.pause();
    this.pending.delete(entry.video);
  }

  /** Those that could be opened. */
  #ready() {
    return [...this.videos.values()].filter(
      ({ video }) => video.readyState >= HTMLMediaElement.HAVE_METADATA && !video.error,
    );
  }

  /** The middle of a frame, since its edge may round to the one before. */
  #time({ timing }, frame) {
    return timing ? timing.time(frame) : (frame + 0.5) / this.fps;
  }

  #frameOf({ video, timing }) {
    const frame = timing ? timing.frame(video.currentTime) : video.currentTime * this.fps;
    return Math.max(0, Math.min(this.frames - 1, Math.floor(frame)));
  }

  #seekVideo(entry, frame) {
    const { video } = entry;
    if (video.readyState < HTMLMediaElement.HAVE_METADATA) return;
    if (video.seeking) this.pending.set(video, frame);
    else video.currentTime = Math.min(this.#time(entry, frame), video.duration);
  }

  #show(frame) {
    this.frame = frame;
    const { range, readout } = this.parts;
    range.value = frame;
    setVars(range, { "--share": frame / Math.max(1, this.frames - 1) });
    const time = (frame / this.fps).toFixed(2);
    range.ariaValueText = `frame ${frame + 1} of ${this.frames}, ${time} seconds`;
    readout.textContent = `${frame + 1} / ${this.frames}`;
    this.onframe(frame);
  }

  seek(frame) {
    const held = Math.max(0, Math.min(this.frames - 1, Math.round(frame)));
    for (const entry of this.#ready()) this.#seekVideo(entry, held);
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
    for (const { video } of this.videos.values()) video.pause();
    this.seek(this.frame);
  }

  play() {
    if (this.isPlaying || !this.videos.size) return;
    this.isPlaying = true;
    this.#showState();
    this.#from(this.frame >= this.frames - 1 ? 0 : this.frame);
  }

  /** Plays on from a frame, all at once: after every one has found it. */
  async #from(frame) {
    const run = (this.run += 1);
    const entries = this.#ready();
    for (const { video } of entries) video.pause();
    this.seek(frame);
    await Promise.all(entries.map(({ video }) => settled(video)));
    if (run !== this.run) return;
    for (const { video } of entries) video.play().catch(ignoreInterruption);
    requestAnimationFrame(() => this.#tick(run));
  }

  #tick(run) {
    if (run !== this.run) return;
    const again = () => requestAnimationFrame(() => this.#tick(run));
    const entries = this.#ready();
    // the first frame may still be on its way
    if (!entries.length) return void again();
    const leader = entries.find(({ timing }) => !timing) ?? entries[0];
    const { video } = leader;
    const end = leader.timing ? leader.timing.time(this.frames - 0.5) : this.frames / this.fps;
    if (video.ended || video.currentTime >= end) {
      if (this.loops) this.#from(0);
      else this.pause();
      return;
    }
    const frame = this.#frameOf(leader);
    if (frame !== this.frame) this.#show(frame);
    for (const entry of entries) {
      if (entry === leader || entry.video.seeking) continue;
      const due = Math.min(video.currentTime, entry.video.duration);
      const time = entry.timing || leader.timing ? this.#time(entry, frame) : due;
      const most = (1.5 / this.fps) * (entry.timing?.speed() ?? 1);
      if (Math.abs(entry.video.currentTime - Math.min(time, entry.video.duration)) > most) {
        entry.video.currentTime = time;
      }
    }
    again();
  }

  #showState() {
    const { play } = this.parts;
    setIcon(play, this.isPlaying ? "pause" : "play");
    play.ariaLabel = this.isPlaying ? "Pause" : "Play";
  }

  /** The next faster or slower speed. */
  changeRate(steps) {
    const { speed } = this.parts;
    speed.selectedIndex =
      Math.max(0, Math.min(speed.length - 1, speed.selectedIndex + steps));
    this.#rated();
  }

  #rated() {
    for (const { video, timing } of this.videos.values()) {
      video.playbackRate = this.rate * (timing?.speed() ?? 1);
    }
  }
}

/**
 * Where the frames of an uploaded video lie that its turns were made of.
 *
 * video: the upload; total: its frames; indices: those that the model sees; fps: of the turns.
 */
export function sourceTiming(video, total, indices, fps) {
  // a rate that its user chose is not the upload's own, which its length tells
  const period = () => {
    const found = video.duration / total;
    return Math.abs(found * fps - 1) < 0.1 ? 1 / fps : found;
  };
  const last = indices.length - 1;
  const stride = Math.max(1, (indices[last] - indices[0]) / Math.max(1, last));
  return {
    time: (frame) => (indices[Math.min(last, Math.floor(frame))] + 0.5 + (frame % 1)) * period(),
    frame: (seconds) => (seconds / period() - indices[0]) / stride,
    speed: () => Math.max(0.0625, Math.min(16, fps * period() * stride)) || 1,
  };
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
