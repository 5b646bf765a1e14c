// The picture: one, or two that are wiped over each other or stand side by side, and their player.

import { h, replace, setVars } from "./dom.js";
import { icon } from "./icons.js";
import { Player } from "./player.js";

const MODES = { wipe: "Wipe", side: "Side by side" };

export class Stage {
  /**
   * root: where it stands. onframe: (frame) is shown; oncompare: (id or null) was picked to stand
   * beside; onmode: () another way to compare was.
   */
  constructor(root, { onframe, oncompare, onmode }) {
    Object.assign(this, { root, oncompare, onmode, mode: "wipe", ids: [] });
    this.panes = [h("div", { class: "pane" }), h("div", { class: "pane over", hidden: true })];
    this.wipe = h("input", {
      type: "range", class: "wipe", min: 0, max: 100, value: 50, step: 1, hidden: true,
      "aria-label": "Where the wipe stands, in percent", oninput: () => this.#wiped(),
    });
    this.area = h("div", { class: "stage", onclick: (event) => this.#clicked(event) },
      h("div", { class: "picture" }, this.panes, this.wipe));
    this.state = h("div", { class: "stage-state" });
    const transport = h("div", {
      class: "transport", role: "group", "aria-label": "Playback",
    });
    this.player = new Player(transport, onframe);
    this.compare = h("select", {
      "aria-label": "Compare with", class: "compare",
      onchange: () => oncompare(this.compare.value || null),
    });
    this.modes = Object.entries(MODES).map(([mode, words]) => h("button", {
      type: "button", class: "chip small", "data-mode": mode, onclick: () => this.setMode(mode),
    }, words));
    this.fit = this.#tool("fit", "Actual size", "Z", () => this.toggleFit());
    this.full = this.#tool("full", "Full screen", "F", () => this.toggleFull());
    transport.append(this.compare, h("span", { class: "modes" }, this.modes), this.fit, this.full);
    replace(root, this.area, this.state, transport);
    document.addEventListener("fullscreenchange", () =>
      this.full.setAttribute("aria-pressed", Boolean(document.fullscreenElement)));
    this.#wiped();
    this.setMode("wipe");
  }

  #tool(name, label, key, onclick) {
    return h("button", {
      type: "button", class: "icon", "aria-label": label, title: `${label} (${key})`,
      "aria-pressed": "false", "data-tool": name, onclick,
    }, icon(name));
  }

  #wiped() {
    setVars(this.area, { "--wipe": `${this.wipe.value}%` });
  }

  #clicked(event) {
    if (event.target.closest("button, input, a, summary, .job")) return;
    this.player.toggle();
  }

  /** width, height: of the turns, in pixels. */
  setSize(width, height) {
    setVars(this.area, { "--aspect": width / height, "--width": `${width}px` });
  }

  /**
   * Shows one or two of {id, title, element, video, timing, isCover}; those without a video stand
   * there as they are.
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
      replace(pane, entry.video ?? entry.element, tag);
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

  setMode(mode) {
    this.mode = mode in MODES ? mode : "wipe";
    this.#showMode();
    this.onmode();
  }

  #showMode() {
    const isTwo = this.ids.length > 1;
    this.area.dataset.mode = isTwo ? this.mode : "one";
    this.wipe.hidden = !isTwo || this.mode !== "wipe";
    for (const button of this.modes) {
      button.hidden = !isTwo;
      button.setAttribute("aria-pressed", button.dataset.mode === this.mode);
    }
  }

  toggleFit() {
    const isActual = this.area.classList.toggle("actual");
    this.fit.setAttribute("aria-pressed", isActual);
  }

  async toggleFull() {
    if (document.fullscreenElement) await document.exitFullscreen();
    else await this.root.requestFullscreen?.();
  }
}
