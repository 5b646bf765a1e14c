// The list of sessions, and how a video gets into it.

import * as api from "./api.js";
import { $, h, icon, replace } from "./dom.js";
import { ago, bytes, percent, plural } from "./format.js";
import { announce, button, problem } from "./notices.js";

export class Uploader {
  /** onsession: (session) that the video became. */
  constructor(onsession) {
    this.onsession = onsession;
    this.zone = $("drop");
    this.input = $("file");
    this.state = $("drop-state");
    this.current = null;
    this.most = Infinity;
    this.input.addEventListener("change", () => {
      if (this.input.files.length) this.take(this.input.files[0]);
      this.input.value = "";
    });
    // the whole page takes a drop: a video that misses the zone would replace the page
    for (const type of ["dragover", "dragleave", "drop"]) {
      window.addEventListener(type, (event) => {
        const { dataTransfer, relatedTarget } = event;
        if (!dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        const isOver = type === "dragover" || (type === "dragleave" && relatedTarget);
        document.body.classList.toggle("dropping", Boolean(isOver));
        if (type === "drop" && dataTransfer.files.length) this.take(dataTransfer.files[0]);
      });
    }
  }

  /** What is too large is not sent; what becomes of a video is said before. */
  setModel(model) {
    const { upload_bytes: most } = model.limits;
    this.most = most;
    const [height, width] = model.size;
    const views = model.kind === "views";
    $("output").textContent = views
      ? `Turns of ${width} × ${height}, ${model.num_frames}\u00a0frames, `
        + `${(model.num_frames / model.fps).toFixed(1)}\u00a0s at ${model.fps} a\u00a0second`
      : "Edits are as long and as large as the video";
    $("pick-limit").textContent =
      `or choose a file, up to ${bytes(most).replace(" ", "\u00a0")}`;
    for (const field of $("guides").children) field.hidden = !model.guides[field.dataset.guide];
    $("read-size").append(...[model.size, ...(model.sizes ?? [])].map(([height, width]) =>
      h("option", { value: `${width}x${height}` }, `${width} × ${height}`)));
  }

  /** [field, text or file]: what edits are given beside a video, and how it is read if not as usual. */
  get choices() {
    return [...this.zone.querySelectorAll("[name]")].flatMap(({ name, value, files }) =>
      (files ? [...files] : [value]).filter(Boolean).map((one) => [name, one]));
  }

  /** Uploads a file; sent again after an error, it is still one session: the key stays. */
  async take(file, key = api.newKey()) {
    this.current?.abort();
    this.current = null;
    this.zone.ariaBusy = null;
    const { choices } = this;
    const size = choices.reduce((sum, [, { size = 0 }]) => sum + size, file.size);
    if (size > this.most) {
      // the service would close the connection on what it does not read, and its words be lost
      const beside = size > file.size ? " with its references and mask" : "";
      problem(this.state, new Error(`${file.name} has ${bytes(size)}${beside}, more than the `
        + `${bytes(this.most)} that this service takes; cut it, or encode it smaller.`));
      return;
    }
    const leaving = new AbortController();
    this.current = leaving;
    const words = h("span", { class: "fine" }, `${file.name}, ${bytes(file.size)}`);
    const bar = h("progress", { "aria-label": "Upload" });
    replace(this.state, h("div", { class: "uploading" }, words, bar,
      button("Stop", () => leaving.abort())));
    this.zone.ariaBusy = "true";
    announce(`Uploading ${file.name}`);
    const onprogress = (share) => {
      if (share < 1) bar.value = share;
      else bar.removeAttribute("value");
      words.textContent = share < 1 ? `${file.name}, ${percent(share)}` : "Looking at the video…";
    };
    try {
      const session = await api.upload(file, {
        key, choices, onprogress, signal: leaving.signal,
      });
      replace(this.state);
      for (const guide of $("guides").querySelectorAll("input")) guide.value = ""; // this video's
      announce(`${file.name} is ready`);
      this.onsession(session);
    } catch (error) {
      if (this.current !== leaving) return; // another file has taken its place
      if (error.name === "AbortError") replace(this.state);
      else problem(this.state, error, () => this.take(file, key));
    } finally {
      if (this.current === leaving) this.zone.ariaBusy = null;
    }
  }
}

export class SessionList {
  constructor() {
    this.list = $("sessions");
    this.state = $("sessions-state");
    this.current = null;
    this.asked = 0;
  }

  /** An answer that a later question has overtaken is not shown: it may list what is gone. */
  async refresh() {
    const asked = ++this.asked;
    try {
      const sessions = await api.sessions();
      if (asked !== this.asked) return;
      replace(this.state);
      this.#show(sessions);
    } catch (error) {
      if (asked === this.asked) problem(this.state, error, () => this.refresh());
    }
  }

  #show(sessions) {
    const children = new Map();
    const known = new Set(sessions.map(({ id }) => id));
    for (const session of sessions) {
      const parent = known.has(session.parent) ? session.parent : null;
      children.set(parent, [...(children.get(parent) ?? []), session]);
    }
    const branches = (id) => (children.get(id) ?? []).map((session) => h("li", null,
      this.#link(session),
      children.has(session.id) && h("ul", { class: "branches" }, branches(session.id))));
    replace(this.list, branches(null));
    if (!sessions.length) {
      replace(this.list,
        h("li", { class: "fine empty" }, "Nothing yet. The first video starts one."));
    }
    this.mark(this.current);
  }

  #link(session) {
    return h("a", {
      href: `#session=${session.id}`, class: "session-link", "data-session": session.id,
    },
    h("span", { class: "session-title" }, session.name || "Untitled",
      session.is_favourite && icon("star")),
    h("span", { class: "fine" }, [
      plural(session.num_turns, "turn"),
      session.parent && (session.parent_turn ? `branched at turn ${session.parent_turn}`
        : "of the same video"),
      ago(session.created),
    ].filter(Boolean).map((words) => words.replaceAll(" ", "\u00a0")).join(" · ")));
  }

  mark(id) {
    this.current = id;
    for (const link of this.list.querySelectorAll(".session-link")) {
      link.ariaCurrent = link.dataset.session === id ? "page" : null;
    }
  }
}
