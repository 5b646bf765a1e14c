// A turn under way: its picture as it comes out of the noise, how far it is, and a way out.

import * as api from "./api.js";
import { requestWords } from "./camera.js";
import { cloned, h, partsOf, replace } from "./dom.js";
import { seconds, stageWords } from "./format.js";
import { announce, button, problem } from "./notices.js";
import { follow } from "./stream.js";

const ENDS = new Set(["finished", "failed", "cancelled"]);

export class Job {
  /**
   * actions: {onfinished: (turn's number), onagain: (request) asks for it once more, ongone: ()
   * once it may go, onchange: () where its words or its picture are others}.
   */
  constructor(job, actions) {
    Object.assign(this, { job }, actions);
    this.id = job.id;
    this.name = requestWords(job.request);
    this.short = "Waiting";
    this.picture = null; // a data URL
    this.leaving = new AbortController();
    this.stages = new Map();
    const content = cloned("job");
    Object.assign(this, partsOf(content));
    this.element = content.firstElementChild;
    this.element.dataset.job = job.id;
    this.title.textContent = this.name;
    this.cancel.addEventListener("click", () => this.#cancel());
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
        replace(this.state);
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
    if (share === null) this.bar.removeAttribute("value");
    else this.bar.value = share;
    this.bar.ariaValueText = words;
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

  #show(image) {
    this.picture = this.image.src = image;
    this.image.hidden = false;
    this.onchange();
  }

  #window({ number, total, seconds_left: left }) {
    this.#say(`Window ${number} of ${total} done, ${seconds(left)} left`, number / total);
  }

  #end(event) {
    this.ended = event.type;
    this.picture = null;
    this.image.hidden = true;
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

  async #cancel() {
    if (this.ended) return;
    replace(this.state);
    this.words.textContent = "Cancelling at the next step…";
    try {
      await api.cancel(this.job.id);
    } catch (error) {
      problem(this.state, error);
    }
  }

  remove() {
    this.leaving.abort();
    this.element.remove();
  }
}

function queueWords(position) {
  if (!position || position === 1) return "Waiting for its turn";
  return `Waiting, ${position - 1} before it`;
}
