// The history as pictures: the source, every turn, and the turns under way.

import * as api from "./api.js";
import { fetchFile } from "./clips.js";
import { requestWords } from "./camera.js";
import { $, h, replace } from "./dom.js";
import { icon } from "./icons.js";

export class History {
  /** onpick: (id, whether it is to stand beside what is shown). */
  constructor(onpick) {
    this.list = $("history");
    this.onpick = onpick;
    this.tiles = new Map();
    this.leaving = new AbortController();
    this.addresses = [];
    this.list.addEventListener("keydown", (event) => this.#key(event));
  }

  clear() {
    this.leaving.abort();
    this.leaving = new AbortController();
    for (const address of this.addresses) URL.revokeObjectURL(address);
    this.addresses = [];
    this.tiles.clear();
    replace(this.list);
  }

  /** session: whose; turns; jobs: `Job`s; shown: ids of what stands on the stage, the first one. */
  show(session, turns, jobs, shown) {
    const wanted = [
      { id: "source", title: "Source", words: "The video as it is" },
      ...turns.map((turn) => ({
        id: String(turn.number), title: `Turn ${turn.number}`, turn,
        words: turn.name || requestWords(turn.request),
      })),
      ...jobs.map((job) => ({ id: job.id, title: job.title, words: job.short, job })),
    ];
    const ids = new Set(wanted.map(({ id }) => id));
    for (const [id, tile] of this.tiles) {
      if (ids.has(id)) continue;
      if (tile.contains(document.activeElement)) this.list.querySelector("button")?.focus();
      tile.remove();
      this.tiles.delete(id);
    }
    for (const [place, entry] of wanted.entries()) {
      const tile = this.tiles.get(entry.id) ?? this.#tile(session, entry);
      if (this.list.children[place] !== tile) {
        this.list.insertBefore(tile, this.list.children[place] ?? null);
      }
      this.#fill(tile, entry, shown);
    }
  }

  #tile(session, { id, turn }) {
    const picture = h("span", { class: "thumb" }, h("img", { alt: "", hidden: true }));
    const pick = h("button", {
      type: "button", class: "tile", onclick: (event) => this.onpick(id, event.shiftKey),
    }, picture, h("span", { class: "tile-title" }), h("span", { class: "tile-words fine" }));
    const tile = h("li", { "data-id": id }, pick);
    this.tiles.set(id, tile);
    if (turn) this.#picture(tile, api.thumbnailPath(session.id, turn.number));
    return tile;
  }

  async #picture(tile, path) {
    try {
      const address = await fetchFile(path, this.leaving.signal);
      this.addresses.push(address);
      setPicture(tile, address);
    } catch {
      // its words are enough; what is wrong with it is said where it is played
    }
  }

  #fill(tile, { id, title, words, turn, job }, shown) {
    const [titleLine, wordsLine] = tile.querySelectorAll(".tile-title, .tile-words");
    replace(titleLine, title, turn?.is_favourite && icon("star"));
    wordsLine.textContent = words;
    const place = shown.indexOf(id);
    tile.classList.toggle("beside", place > 0);
    const pick = tile.firstChild;
    pick.title = words;
    if (place === 0) pick.setAttribute("aria-current", "true");
    else pick.removeAttribute("aria-current");
    pick.setAttribute("aria-label",
      [title, words, turn?.is_favourite && "favourite"].filter(Boolean).join(", "));
    if (job) {
      tile.classList.add("under-way");
      setPicture(tile, job.picture);
    }
  }

  /** The source's own picture, once its video has one. */
  setSource(video) {
    const tile = this.tiles.get("source");
    if (!tile) return;
    const draw = () => {
      const canvas = h("canvas", { width: 160, height: 96 });
      const scale = Math.max(160 / video.videoWidth, 96 / video.videoHeight);
      const [width, height] = [video.videoWidth * scale, video.videoHeight * scale];
      canvas.getContext("2d").drawImage(
        video, (160 - width) / 2, (96 - height) / 2, width, height);
      replace(tile.querySelector(".thumb"), canvas);
    };
    if (video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA) draw();
    else video.addEventListener("loadeddata", draw, { once: true });
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const here = event.target.closest("li");
    if (!step || !here) return;
    event.preventDefault();
    const next = step > 0 ? here.nextElementSibling : here.previousElementSibling;
    next?.querySelector("button").focus();
  }
}

function setPicture(tile, address) {
  const image = tile.querySelector("img");
  if (!image || image.src === (address ?? "")) return;
  image.hidden = !address;
  if (address) image.src = address;
}
