// A turn under way: its picture as it comes out of the noise, how far it is, and a way out.

import * as api from "./api.js";
import { requestWords } from "./camera.js";
import { h, replace, setVars } from "./dom.js";
import { seconds } from "./format.js";
import { announce, button, clear, problem } from "./notices.js";
import { stageWords } from "./report.js";
import { follow } from "./stream.js";

const ENDS = new Set(["finished", "failed", "cancelled"]);

export class Job {
  /**
   * onfinished: (turn's number); onagain: (request) asks for it once more; ongone: () once it may
   * go; onchange: () where its words or its picture are others.
   */
  constructor(job, { onfinished, onagain, ongone, onchange }) {
    Object.assign(this, { job, onfinished, onagain, ongone, onchange });
    this.id = job.id;
    this.title = requestWords(job.request);
    this.short = "Waiting";
    this.picture = null; // its address
    this.leaving = new AbortController();
    this.stages = new Map();
    this.image = h("img", { class: "preview-picture", hidden: true,
      alt: "What the turn looks like at this step" });
    this.words = h("p", { class: "job-words" });
    this.link = h("p", { class: "fine job-link" });
    this.bar = h("div", {
      class: "progress waiting", role: "progressbar", "aria-label": "Progress of the turn",
      "aria-valuemin": 0, "aria-valuemax": 100,
    }, h("span"));
    this.list = h("ol", { class: "stages" });
    this.state = h("div");
    this.stop = button("Cancel", () => this.cancel(), "close");
    this.tools = h("div", { class: "row" }, this.stop);
    this.element = h("article", { class: "job", "data-job": job.id, tabindex: "-1" },
      this.image,
      h("div", { class: "job-panel" },
        h("h2", { class: "job-title" }, this.title), this.words, this.bar, this.link, this.state,
        h("details", null, h("summary", { class: "fine" }, "Steps"), this.list), this.tools));
  }

  /** Follows the job, or shows how it ended: a turn asked for again may long be finished. */
  begin() {
    const { state, position, number, error } = this.job;
    if (ENDS.has(state)) this.#end({ type: state, turn: number, error });
    else {
      this.#say(state === "queued" ? queueWords(position) : "Starting");
      this.#follow();
    }
  }

  async #follow() {
    try {
      await follow(api.eventsPath(this.job.id), {
        signal: this.leaving.signal,
        onlink: (isUp) => {
          this.link.textContent = isUp ? "" : "Connection lost; trying again…";
        },
        onevent: (event) => this.#take(event),
      });
    } catch (error) {
      problem(this.state, error, () => {
        clear(this.state);
        this.#follow();
      });
    }
  }

  /** Shows an event; true after the last one. */
  #take(event) {
    const shown = {
      queued: () => this.#say(queueWords(event.position)),
      started: () => this.#say("Starting"),
      stage_started: () => this.#stage(event.stage),
      stage_done: () => this.#stage(event.stage, event.seconds),
      step_done: () => this.#step(event),
      preview: () => this.#show(event.image),
      window_started: () => this.#say(`Window ${event.number} of ${event.total}`),
      window_done: () => this.#window(event),
    };
    shown[event.type]?.();
    if (ENDS.has(event.type)) this.#end(event);
    return ENDS.has(event.type);
  }

  #say(words, share = null, isSpoken = true) {
    this.words.textContent = words;
    this.short = share === null ? words : `${Math.round(100 * share)} %`;
    this.bar.classList.toggle("waiting", share === null);
    if (share === null) this.bar.removeAttribute("aria-valuenow");
    else {
      this.bar.setAttribute("aria-valuenow", Math.round(100 * share));
      setVars(this.bar, { "--share": share });
    }
    this.bar.setAttribute("aria-valuetext", words);
    if (isSpoken) announce(words);
    this.onchange();
  }

  #stage(stage, spent = null) {
    const known = this.stages.get(stage);
    const total = spent === null ? known?.spent : spent;
    const item = known?.item ?? h("li");
    replace(item, h("span", null, stageWords(stage)),
      total !== undefined && h("span", { class: "fine" }, seconds(total)));
    item.className = spent === null ? "current" : "done";
    if (!known) this.list.append(item);
    this.stages.set(stage, { item, spent: total });
    if (spent === null) this.#say(stageWords(stage));
  }

  #step({ stage, step, total, seconds_left: left }) {
    const rest = step < total ? `, ${seconds(left)} left` : "";
    // a screen reader hears of quarters, not of fifty steps
    const isQuarter = Math.floor((4 * step) / total) > Math.floor((4 * (step - 1)) / total);
    this.#say(`${stageWords(stage)}: step ${step} of ${total}${rest}`, step / total, isQuarter);
  }

  /** Shows a data URL in place of the last one; the page's policy lets in blobs alone. */
  #show(image) {
    const bytes = Uint8Array.from(atob(image.split(",")[1]), (letter) => letter.charCodeAt(0));
    this.#forget();
    this.picture = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
    this.image.src = this.picture;
    this.image.hidden = false;
    this.onchange();
  }

  #forget() {
    this.image.hidden = true;
    if (this.picture) URL.revokeObjectURL(this.picture);
    this.picture = null;
  }

  #window({ number, total, seconds_left: left }) {
    this.#say(`Window ${number} of ${total} done, ${seconds(left)} left`, number / total);
  }

  #end(event) {
    this.ended = event.type;
    this.#forget();
    this.link.textContent = "";
    if (event.type === "finished") {
      announce(`Turn ${event.turn} is finished`);
      this.onfinished(event.turn);
      return;
    }
    const again = () => this.onagain(this.job.request);
    this.#say(event.type === "failed" ? "Failed" : "Cancelled. The session is as it was before.");
    if (event.type === "failed") problem(this.state, event.error, again);
    this.bar.hidden = true;
    const gone = button("Put away", () => this.ongone());
    const hadFocus = this.tools.contains(document.activeElement);
    // a failure's own box has the other one
    replace(this.tools, event.type === "cancelled" && button("Try again", again), gone);
    if (hadFocus) gone.focus();
    this.onchange();
  }

  async cancel() {
    if (this.ended) return;
    clear(this.state);
    this.words.textContent = "Cancelling at the next step…";
    try {
      await api.cancel(this.job.id);
    } catch (error) {
      problem(this.state, error);
    }
  }

  remove() {
    this.leaving.abort();
    this.#forget();
    this.element.remove();
  }
}

function queueWords(position) {
  if (!position || position === 1) return "Waiting for its turn";
  return `Waiting, ${position - 1} before it`;
}
