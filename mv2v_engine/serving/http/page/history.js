// The history as pictures: the source, every turn, and the turns under way.

import * as api from "./api.js";
import { requestWords } from "./camera.js";
import { $, cloned, h, icon, partsOf, replace } from "./dom.js";

export class History {
  /** clips: the session's files; onpick: (id, whether it is to stand beside what is shown). */
  constructor(clips, onpick) {
    Object.assign(this, { clips, onpick, list: $("history"), tiles: new Map() });
    this.list.addEventListener("keydown", (event) => this.#key(event));
  }

  clear() {
    this.tiles.clear();
    replace(this.list);
  }

  /** Gives the focus to what is shown. */
  focus() {
    this.list.querySelector("[aria-current]")?.focus();
  }

  /** session: whose; turns; jobs: `Job`s; shown: ids of what stands on the stage, the first one. */
  show(session, turns, jobs, shown) {
    const wanted = [
      { id: "source", title: "Source", words: "The original" },
      ...turns.map((turn) => ({
        id: String(turn.number), title: `Turn ${turn.number}`, turn,
        words: turn.name || requestWords(turn.request),
      })),
      ...jobs.map((job) => ({ id: job.id, title: job.name, words: job.short, job })),
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
    const content = cloned("tile");
    const tile = content.firstElementChild;
    tile.dataset.id = id;
    partsOf(tile).pick.addEventListener("click", (event) => this.onpick(id, event.shiftKey));
    this.tiles.set(id, tile);
    const show = (address) => (turn ? setPicture(tile, address)
      : replace(partsOf(tile).thumb, h("video", { src: `${address}#t=0.01`, tabindex: -1 })));
    // its words are enough; what is wrong with it is said where it is played
    if (turn) this.clips.file(api.thumbnailPath(session.id, turn.number)).then(show, () => {});
    else if (id === "source") this.clips.later(api.sourcePath(session.id)).then(show, () => {});
    return tile;
  }

  #fill(tile, { id, title, words, turn, job }, shown) {
    const { pick, title: titleLine, words: wordsLine } = partsOf(tile);
    replace(titleLine, title, turn?.is_favourite && icon("star"));
    wordsLine.textContent = words;
    const place = shown.indexOf(id);
    tile.classList.toggle("beside", place > 0);
    pick.title = words;
    pick.ariaCurrent = place === 0 ? "true" : null;
    pick.ariaLabel = [title, words, turn?.is_favourite && "favourite"].filter(Boolean).join(", ");
    if (job) {
      tile.classList.add("under-way");
      setPicture(tile, job.picture);
    }
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
