// The cards that stand side by side: the source, every turn, and the turn under way.

import * as api from "./api.js";
import { requestWords } from "./camera.js";
import { h, replace } from "./dom.js";
import { bytes } from "./format.js";
import { button, clear, problem } from "./notices.js";
import { costSection, memorySection } from "./report.js";

const RETRIES = 20; // of a file that is being made again after a crash

/** A card with a video in it that loads by itself. */
class VideoCard {
  /** player: plays it along; path: of its video. */
  constructor({ id, player, title, words, path, poster, aspect }) {
    this.id = id;
    this.player = player;
    this.loading = new AbortController();
    this.addresses = [];
    this.video = h("video", { playsinline: true, preload: "auto", "aria-label": title });
    this.video.muted = true;
    this.state = h("div", { class: "card-state" });
    this.body = h("div", { class: "card-body" });
    this.element = h("article", { class: "card", id: `card-${id}`, tabindex: "-1" },
      h("div", { class: "frame", vars: { "--aspect": aspect } }, this.video),
      h("header", { class: "card-head" },
        h("h3", null, title), h("p", { class: "card-words", title: words }, words)),
      this.state, this.body);
    this.#load(path, poster);
  }

  async #load(path, poster) {
    clear(this.state);
    try {
      if (poster) this.video.poster = await this.#file(poster);
      this.video.src = await this.#file(path);
      this.video.addEventListener("error", () => problem(this.state, new Error(
        "This browser cannot play the video's format; download it to see it.")), { once: true });
      if (!this.element.hidden) this.player.add(this.id, this.video);
    } catch (error) {
      if (error.name !== "AbortError") problem(this.state, error, () => this.#load(path, poster));
    }
  }

  async #file(path, attempt = 1) {
    try {
      const address = await api.fetchFile(path, this.loading.signal);
      this.addresses.push(address);
      return address;
    } catch (error) {
      if (error.code !== "not_finished" || attempt === RETRIES) throw error;
      await new Promise((resolve) => { setTimeout(resolve, 1000 * (error.retryAfter ?? 1)); });
      return this.#file(path, attempt + 1);
    }
  }

  /** Side by side with the others, or put aside and no longer playing. */
  setShown(isShown) {
    if (this.element.hidden !== isShown) return;
    this.element.hidden = !isShown;
    if (!isShown) this.player.remove(this.id);
    else if (this.video.src) this.player.add(this.id, this.video);
  }

  /** Runs an action of the card's; its error stands on the card. */
  async attempt(pressed, action) {
    clear(this.state);
    pressed.disabled = true;
    try {
      await action();
    } catch (error) {
      problem(this.state, error);
    } finally {
      pressed.disabled = false;
    }
  }

  remove() {
    this.loading.abort();
    this.player.remove(this.id);
    this.video.removeAttribute("src");
    for (const address of this.addresses) URL.revokeObjectURL(address);
    this.element.remove();
  }
}

/** A file name that any system takes. */
function fileName(session, suffix) {
  const stem = session.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "_") || "video";
  return `${stem}_${suffix}`;
}

export function sourceCard(session, { player, aspect, onbranch }) {
  const card = new VideoCard({
    id: "source", player, aspect, title: "Source", words: session.name,
    path: api.sourcePath(session.id),
  });
  const start = button("Start afresh", () => card.attempt(start, () => onbranch(0)), "branch");
  start.title = "A new session of the same video, without turns";
  replace(card.body,
    session.warnings.map((warning) => h("p", { class: "note" }, warning)),
    h("div", { class: "row tools" }, start));
  return card;
}

/** settings: {player, aspect, numFrames, open: (turn), onbranch: (turn)}. */
export function turnCard(session, turn, { player, aspect, numFrames, open, onbranch }) {
  const words = requestWords(turn.request);
  const card = new VideoCard({
    id: String(turn.number), player, aspect, title: `Turn ${turn.number}`, words,
    path: api.videoPath(session.id, turn.number),
    poster: api.thumbnailPath(session.id, turn.number),
  });
  const save = button("Download", () => card.attempt(save, () => api.download(
    api.videoPath(session.id, turn.number), fileName(session, `turn_${turn.number}.mp4`))),
  "download");
  save.title = `mp4, ${bytes(turn.bytes)} with its report and latents`;
  // an edit's turns do not build on each other, so that there is nothing to branch from
  const fork = session.kind === "views"
    && button("Branch", () => card.attempt(fork, () => onbranch(turn.number)), "branch");
  if (fork) fork.title = `A new session that remembers turns 1 to ${turn.number}`;
  replace(card.body,
    turn.warnings.map((warning) => h("p", { class: "note" }, warning)),
    memorySection(turn.report, { numFrames, open }),
    costSection(turn.report),
    h("div", { class: "row tools" }, save, fork));
  return card;
}
