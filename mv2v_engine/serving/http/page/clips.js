// The files of one session, videos and pictures: each is fetched once, when it is first shown.

import * as api from "./api.js";
import { h } from "./dom.js";

const RETRIES = 20; // of a file that is being made again after a crash

export class Clips {
  /** onproblem: (id, error or null) of a video that cannot be shown, or can again. */
  constructor(onproblem) {
    this.onproblem = onproblem;
    this.clips = new Map(); // id: {video, paths}
    this.files = new Map(); // path: a promise of its address
    this.leaving = new AbortController();
    this.first = null; // a promise
  }

  /** A file's address, once it is there. */
  file(path) {
    if (!this.files.has(path)) {
      const fetched = fetchFile(path, this.leaving.signal);
      this.files.set(path, fetched);
      fetched.catch(() => this.files.get(path) === fetched && this.files.delete(path));
    }
    return this.files.get(path);
  }

  /** The video element of an id; it loads by itself. poster: of a picture until it has. */
  get(id, path, title, poster = null) {
    const known = this.clips.get(id);
    if (known) return known.video;
    const video = h("video", { playsinline: true, preload: "auto", "aria-label": title });
    video.muted = true;
    this.clips.set(id, { video, paths: [path, poster] });
    video.addEventListener("error", () => this.#tell(id, video, new Error(
      "This browser cannot play the video's format; download it to see it.")));
    // the picture first; the video itself tells what is wrong
    if (poster) this.file(poster).then((address) => { video.poster = address; }, () => {});
    this.#load(id, video, path);
    this.first ??= new Promise((resolve) => {
      for (const name of ["loadeddata", "error"]) video.addEventListener(name, resolve);
      setTimeout(resolve, 2000);
    });
    return video;
  }

  /** A file's address, once the first video that is shown has its picture. */
  async later(path) {
    await this.first;
    return this.file(path);
  }

  async #load(id, video, path) {
    try {
      const address = await this.file(path);
      if (this.#tell(id, video, null)) video.src = address;
    } catch (error) {
      if (error.name !== "AbortError") {
        this.#tell(id, video, error, () => this.#load(id, video, path));
      }
    }
  }

  /** What is wrong with a video, as long as it is the id's: whether it is. */
  #tell(id, video, error, again) {
    const isCurrent = this.clips.get(id)?.video === video;
    if (isCurrent) this.onproblem(id, error, again);
    return isCurrent;
  }

  remove(id) {
    const clip = this.clips.get(id);
    if (!clip) return;
    this.clips.delete(id);
    clip.video.removeAttribute("src");
    clip.video.remove();
    for (const path of clip.paths) this.#forget(path);
  }

  #forget(path) {
    this.files.get(path)?.then(URL.revokeObjectURL, () => {});
    this.files.delete(path);
  }

  clear() {
    this.leaving.abort();
    this.leaving = new AbortController();
    this.first = null;
    for (const id of [...this.clips.keys()]) this.remove(id);
    for (const path of [...this.files.keys()]) this.#forget(path);
  }
}

async function fetchFile(path, signal, attempt = 1) {
  try {
    return await api.fetchFile(path, signal);
  } catch (error) {
    if (error.code !== "not_finished" || attempt === RETRIES) throw error;
    await new Promise((resolve) => { setTimeout(resolve, 1000 * (error.retryAfter ?? 1)); });
    return fetchFile(path, signal, attempt + 1);
  }
}
