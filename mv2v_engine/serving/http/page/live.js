// The view of a model that streams: a video that plays while it is made, told another prompt on the
// way, and, of a model that edits, made of what this machine's camera sees.

import * as api from "./api.js";
import { $, h, replace } from "./dom.js";
import { ago, bytes } from "./format.js";
import { announce, attempt, button, problem } from "./notices.js";

const KEPT = 30; // seconds of video behind the one that is shown
const BEHIND = 0.5; // seconds that the player stays behind the newest frame it has
const STATUS = 1000; // ms between two looks at the stream
const UNSENT = 4; // frames that may wait in this browser; what is more is left out

const WAITS = {
  reader: "waits for the player", source: "waits for frames", worker: "waits for a worker",
};

const streamPath = (id) => `v1/streams/${id}`;

/** Where frames go up. A WebSocket has no headers of its own, so the token is a protocol's name. */
function sourceSocket(id) {
  const address = new URL(`${streamPath(id)}/source`, api.ROOT);
  address.protocol = address.protocol.replace("http", "ws");
  const token = api.getToken();
  const name = `token.${api.hex(new TextEncoder().encode(token))}`;
  return new WebSocket(address, token ? ["mv2v", name] : ["mv2v"]);
}

/** Appends a stream's video to a player as it comes. signal: of another that takes its place. */
class Player {
  constructor(video, signal) {
    this.video = video;
    this.signal = signal;
    this.isBegun = false;
  }

  /** Plays a response's body to its end. codec: as the stream's status has it. */
  async play(response, codec) {
    const source = new MediaSource();
    this.video.src = URL.createObjectURL(source);
    await new Promise((done) => { source.addEventListener("sourceopen", done, { once: true }); });
    URL.revokeObjectURL(this.video.src);
    const buffer = source.addSourceBuffer(`video/mp4; codecs="${codec}"`);
    const reader = response.body.getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done || this.signal.aborted) break;
      await appended(buffer, () => buffer.appendBuffer(value));
      await this.keepUp(buffer);
    }
    if (source.readyState === "open") source.endOfStream();
    this.begin(); // of a video that is shorter than what a player stays behind
  }

  /** Shows what is new, and lets go of what is long past, so that memory does not grow. */
  async keepUp(buffer) {
    const { video } = this;
    if (!video.buffered.length) return;
    const start = video.buffered.start(0);
    const end = video.buffered.end(video.buffered.length - 1);
    if (video.currentTime < start) video.currentTime = start;
    if (end - start >= BEHIND) this.begin();
    if (video.currentTime - start > 2 * KEPT) {
      await appended(buffer, () => buffer.remove(start, video.currentTime - KEPT));
    }
    // a player that is far behind takes no more for now: the service waits for it
    while (end - video.currentTime > KEPT && !this.signal.aborted) {
      await new Promise((done) => { setTimeout(done, 200); });
    }
  }

  /** Begins to play, once: whoever stops it then means it. */
  begin() {
    if (!this.isBegun && !this.signal.aborted) this.video.play().catch(() => {});
    this.isBegun = true;
  }
}

function appended(buffer, change) {
  return new Promise((resolve, reject) => {
    buffer.addEventListener("updateend", resolve, { once: true });
    buffer.addEventListener("error", () => reject(new Error("the browser cannot play this video")),
      { once: true });
    change();
  });
}

/** This machine's camera, each frame cut to the model's size and sent by a WebSocket. */
class Camera {
  constructor(model) {
    const [height, width] = model.size;
    this.stream = { width, height, fps: model.fps };
    this.video = h("video", { muted: true, playsinline: true, class: "live-camera",
      "aria-label": "What the camera sees" });
    this.dropped = 0;
  }

  async open() {
    const { width, height, fps } = this.stream;
    if (!navigator.mediaDevices) {
      throw new Error("A browser lets a page use the camera on this machine or over https alone.");
    }
    try {
      this.media = await navigator.mediaDevices.getUserMedia({
        video: { width: { ideal: width }, height: { ideal: height }, frameRate: { ideal: fps } },
      });
    } catch (error) {
      throw new Error(`The camera cannot be used: ${error.message}`);
    }
    this.video.srcObject = this.media;
    await this.video.play();
  }

  /** Sends its frames to a stream. */
  async start(id) {
    const { width, height, fps } = this.stream;
    this.socket = sourceSocket(id);
    this.socket.binaryType = "arraybuffer";
    await new Promise((resolve, reject) => {
      this.socket.addEventListener("open", resolve, { once: true });
      this.socket.addEventListener("close", () => reject(new Error("the service takes no frames")),
        { once: true });
    });
    const canvas = new OffscreenCanvas(width, height);
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.timer = setInterval(() => this.send(), 1000 / fps);
  }

  send() {
    const { width, height } = this.stream;
    if (this.socket.readyState !== WebSocket.OPEN) return;
    if (this.socket.bufferedAmount > UNSENT * width * height * 3) {
      this.dropped += 1;
      return;
    }
    const { videoWidth, videoHeight } = this.video;
    const scale = Math.max(width / videoWidth, height / videoHeight);
    const [w, hh] = [videoWidth * scale, videoHeight * scale];
    this.context.drawImage(this.video, (width - w) / 2, (height - hh) / 2, w, hh);
    const { data } = this.context.getImageData(0, 0, width, height);
    const rgb = new Uint8Array(width * height * 3);
    for (let at = 0, to = 0; at < data.length; at += 4) {
      rgb[to++] = data[at];
      rgb[to++] = data[at + 1];
      rgb[to++] = data[at + 2];
    }
    this.socket.send(rgb);
  }

  stop() {
    clearInterval(this.timer);
    this.socket?.close();
    for (const track of this.media?.getTracks() ?? []) track.stop();
  }
}

export class Live {
  /** confirmed: asks whether it is meant: ({ title, words, yes }). */
  constructor(model, confirmed) {
    this.model = model;
    this.confirmed = confirmed;
    const { has_source: isEditor } = model.stream;
    this.prompt = h("input", { id: "live-prompt", type: "text", name: "prompt", maxlength: 8192,
      required: true, autocomplete: "off",
      placeholder: isEditor ? "What becomes of what the camera sees" : "What the video shows" });
    this.go = h("button", { class: "button primary" }, "Start");
    this.end = h("button", { type: "button", class: "button", disabled: true,
      onclick: () => this.stop() }, "Stop");
    this.video = h("video", { muted: true, playsinline: true, controls: true, class: "live-video",
      "aria-label": "The stream" });
    this.video.muted = true;
    this.state = h("p", { class: "fine", role: "status" }, "Nothing is made yet.",
      isEditor && " Start sends what this machine’s camera sees.");
    this.problems = h("div", {});
    this.camera = null;
    this.cameraPlace = h("div", { class: "live-source" });
    this.holdsFrom = 0; // the first block that has the prompt
    this.kept = h("ul", { class: "live-kept", "aria-label": "Streams that are kept" });
    const form = h("form", { class: "live-form", onsubmit: (event) => {
      event.preventDefault();
      this.submit();
    } }, h("label", { class: "field", for: "live-prompt" }, h("span", {}, "Prompt"), this.prompt),
    h("div", { class: "row" }, this.go, this.end));
    replace($("streams"), h("h1", {}, "Live"),
      h("div", { class: "live-stage" }, this.video, this.cameraPlace), form, this.state,
      this.problems, this.kept);
    window.addEventListener("pagehide", () => this.camera?.stop());
    this.list();
  }

  /** The streams that take room, the newest ones, where none is followed. */
  async list() {
    try {
      const { data } = await api.json("v1/streams?limit=100");
      replace(this.kept, this.isLive ? [] : data.map((stream) => this.row(stream)));
    } catch (error) {
      problem(this.problems, error, () => this.list());
    }
  }

  row(stream) {
    const { id, prompt, seconds, created } = stream;
    const state = stream.state === "running" ? "being made" : stream.error?.code ?? stream.state;
    const told = [`${seconds.toFixed(1)} s of video`, bytes(stream.bytes), state, ago(created)];
    const play = (stream.codec || stream.state === "running")
      && button("Play", () => this.follow(stream), "play");
    const remove = button("Delete", () => attempt(remove, this.problems, () => this.remove(stream)));
    return h("li", null,
      h("span", { class: "live-told" }, prompt, h("span", { class: "fine" }, told.join(" · "))),
      h("span", { class: "row" }, play, remove));
  }

  /** Plays a stream that was begun before, here or elsewhere. */
  follow(stream) {
    this.prompt.value = stream.prompt;
    this.show(stream);
    this.watch(stream.id);
    this.play(stream.id);
  }

  async remove(stream) {
    const words = `“${stream.prompt}” goes, with all that was made of it.`;
    if (!await this.confirmed({ title: "Delete this stream?", words, yes: "Delete it" })) return;
    await api.send(streamPath(stream.id), { method: "DELETE" });
    await this.list();
  }

  get isLive() {
    return this.stream?.state === "running";
  }

  /** A new stream, or another prompt for the one that is made. */
  async submit() {
    replace(this.problems);
    try {
      if (this.isLive) {
        const { first_block: first } = await api.post(
          `${streamPath(this.stream.id)}/prompt`, { prompt: this.prompt.value });
        announce(`The prompt holds from block ${first} on`);
        this.holdsFrom = first;
        this.show(this.stream);
      } else {
        await this.begin();
      }
    } catch (error) {
      problem(this.problems, error);
    }
  }

  async begin() {
    let camera = null;
    try {
      if (this.model.stream.has_source) {
        camera = new Camera(this.model);
        await camera.open(); // before there is a stream that waits for its frames
      }
      this.show(await api.post("v1/streams", { prompt: this.prompt.value }, api.newKey()));
      this.camera = camera;
      if (camera) {
        replace(this.cameraPlace, camera.video);
        await camera.start(this.stream.id);
      }
    } catch (error) {
      camera?.stop();
      if (this.isLive) await this.stop();
      throw error;
    }
    this.watch(this.stream.id);
    this.play(this.stream.id);
  }

  /** Plays a stream from its beginning, in the place of what is played. */
  async play(id) {
    this.leaving?.abort();
    const { signal } = this.leaving = new AbortController();
    try {
      const response = await api.send(`${streamPath(id)}/video?first=1`, { signal });
      let status;
      do {
        status = await api.json(streamPath(id), { signal });
        if (!status.codec) await new Promise((done) => { setTimeout(done, 100); });
      } while (!status.codec && status.state === "running");
      if (status.codec) await new Player(this.video, signal).play(response, status.codec);
    } catch (error) {
      if (!signal.aborted) problem(this.problems, error);
    }
  }

  async watch(id) {
    while (this.isLive && this.stream.id === id) {
      await new Promise((done) => { setTimeout(done, STATUS); });
      try {
        const now = await api.json(streamPath(id));
        if (this.stream.id === id) this.show(now);
      } catch (error) {
        if (error.code === "not_found") return;
      }
    }
  }

  /** Lets go of the camera. */
  release() {
    this.camera?.stop();
    this.camera = null;
    replace(this.cameraPlace);
  }

  async stop() {
    this.release();
    try {
      if (this.stream) this.show(await api.post(`${streamPath(this.stream.id)}/cancel`, {}));
    } catch (error) {
      problem(this.problems, error);
    }
  }

  show(stream) {
    const wasLive = this.isLive;
    this.stream = stream;
    const live = stream.state === "running";
    if (!live) {
      this.release();
      this.holdsFrom = 0;
    }
    if (live !== Boolean(wasLive)) this.list();
    this.go.textContent = live ? "Change prompt" : "Start";
    this.end.disabled = !live;
    const rate = stream.latency && `${stream.latency.frames_per_second.toFixed(1)} frames a second`;
    const words = [
      live ? WAITS[stream.waits_for] ?? "being made" : stream.error?.message ?? stream.state,
      `${stream.seconds.toFixed(1)} s of video`,
      rate,
      this.holdsFrom > stream.blocks ? `the new prompt comes with block ${this.holdsFrom}` : null,
      this.camera?.dropped ? `${this.camera.dropped} frames of the camera left out` : null,
    ];
    this.state.textContent = words.filter(Boolean).join(" · ");
  }
}
