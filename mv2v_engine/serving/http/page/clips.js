// The videos of one session: each is fetched once, when it is first shown.

import * as api from "./api.js";
import { h } from "./dom.js";

const RETRIES = 20; // of a file that is being made again after a crash

export class Clips {
  /** onproblem: (id, error or null) of a video that cannot be shown, or can again. */
  constructor(onproblem) {
    this.onproblem = onproblem;
    this.clips = new Map();
  }

  /** The video element of an id; it loads by itself. poster: of a picture until it has. */
  get(id, path, title, poster = null) {
    const known = this.clips.get(id);
    if (known) return known.video;
    const video = h("video", { playsinline: true, preload: "auto", "aria-label": title });
    video.muted = true;
    const clip = { video, leaving: new AbortController(), addresses: [] };
    this.clips.set(id, clip);
    video.addEventListener("error", () => this.onproblem(id, new Error(
      "This browser cannot play the video's format; download it to see it.")));
    this.#load(id, clip, path);
    if (poster) this.#poster(clip, poster);
    return video;
  }

  async #poster(clip, path) {
    try {
      const address = await fetchFile(path, clip.leaving.signal);
      clip.addresses.push(address);
      clip.video.poster = address;
    } catch {
      // the video itself tells what is wrong
    }
  }

  async #load(id, clip, path) {
    try {
      const address = await fetchFile(path, clip.leaving.signal);
      clip.addresses.push(address);
      clip.video.src = address;
      this.onproblem(id, null);
    } catch (error) {
      if (error.name !== "AbortError") this.onproblem(id, error, () => this.#load(id, clip, path));
    }
  }

  remove(id) {
    const clip = this.clips.get(id);
    if (!clip) return;
    this.clips.delete(id);
    clip.leaving.abort();
    clip.video.removeAttribute("src");
    clip.video.remove();
    for (const address of clip.addresses) URL.revokeObjectURL(address);
  }

  clear() {
    for (const id of [...this.clips.keys()]) this.remove(id);
  }
}

/** A file's address, once it is there. */
export async function fetchFile(path, signal, attempt = 1) {
  try {
    return await api.fetchFile(path, signal);
  } catch (error) {
    if (error.code !== "not_finished" || attempt === RETRIES) throw error;
    await new Promise((resolve) => { setTimeout(resolve, 1000 * (error.retryAfter ?? 1)); });
    return fetchFile(path, signal, attempt + 1);
  }
}
