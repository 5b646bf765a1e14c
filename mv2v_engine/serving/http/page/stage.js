// The picture: one, or two that are wiped over each other or stand side by side, and their player.

import { h, onClick, partsOf, replace, setVars } from "./dom.js";
import { Player } from "./player.js";

export class Stage {
  /**
   * root: where it stands. onframe: (frame) is shown; oncompare: (id or null) was picked to stand
   * beside; onmode: () another way to compare was.
   */
  constructor(root, { onframe, oncompare, onmode }) {
    Object.assign(this, { root, onmode, mode: "wipe", ids: [] }, partsOf(root));
    this.panes = root.querySelectorAll(".pane");
    this.modes = root.querySelectorAll("[data-mode]");
    this.wipe.addEventListener("input", () => this.#wiped());
    this.area.addEventListener("click", (event) => {
      if (!event.target.closest("button, input, a, summary, .job")) this.player.toggle();
    });
    this.player = new Player(root.querySelector(".transport"), onframe);
    this.compare.addEventListener("change", () => oncompare(this.compare.value || null));
    onClick(root, {
      mode: ({ dataset }) => this.setMode(dataset.mode),
      fit: () => { this.fit.ariaPressed = this.area.classList.toggle("actual"); },
      full: () => {
        if (document.fullscreenElement) document.exitFullscreen();
        else root.requestFullscreen?.();
      },
    });
    document.addEventListener("fullscreenchange", () => {
      this.full.ariaPressed = Boolean(document.fullscreenElement);
    });
    this.#wiped();
    this.setMode("wipe");
  }

  #wiped() {
    setVars(this.area, { "--wipe": `${this.wipe.value}%` });
  }

  /** width, height: of the turns, in pixels. */
  setSize(width, height) {
    setVars(this.area, { "--aspect": width / height, "--width": `${width}px` });
  }

  /**
   * Shows one or two of {id, title, element, video, under, timing, isCover}; those without a video
   * stand there as they are. under: what is seen until the video has a picture.
   */
  show(...shown) {
    const ids = shown.map(({ id }) => id);
    for (const id of this.ids) if (!ids.includes(id)) this.player.remove(id);
    this.ids = ids;
    for (const [index, pane] of this.panes.entries()) {
      const entry = shown[index];
      pane.hidden = !entry;
      if (!entry) {
        replace(pane);
        continue;
      }
      pane.dataset.shown = entry.id;
      pane.classList.toggle("cover", Boolean(entry.isCover));
      const tag = shown.length > 1 && h("span", { class: "tag" }, entry.title);
      replace(pane, entry.under, entry.video ?? entry.element, tag);
      if (entry.video) this.player.add(entry.id, entry.video, entry.timing);
    }
    this.area.classList.toggle("two", shown.length > 1);
    this.#showMode();
  }

  /** choices: [id, words] of all that could stand beside; id: that does, or null. */
  setChoices(choices, id) {
    replace(this.compare, h("option", { value: "" }, "Compare…"),
      choices.map(([value, words]) => h("option", { value, selected: value === id }, words)));
  }

  /** mode: "wipe" or "side". */
  setMode(mode) {
    this.mode = mode === "side" ? mode : "wipe";
    this.#showMode();
    this.onmode();
  }

  #showMode() {
    const isTwo = this.ids.length > 1;
    this.area.dataset.mode = isTwo ? this.mode : "one";
    this.wipe.hidden = !isTwo || this.mode !== "wipe";
    for (const button of this.modes) {
      button.hidden = !isTwo;
      button.ariaPressed = button.dataset.mode === this.mode;
    }
  }
}
