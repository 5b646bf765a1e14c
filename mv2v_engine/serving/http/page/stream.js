// Server-sent events through fetch, because EventSource cannot send the Authorization header.

import { ServiceError, send } from "./api.js";

const SILENCE = 45_000; // ms; the server sends a comment every 15 s
const LONGEST_WAIT = 10_000; // ms between two attempts

/** The events of a response: {id, type, data}. */
async function* parsed(body, onbytes) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { id: null, type: "message", data: [] };
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onbytes();
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (event.data.length) yield { ...event, data: event.data.join("\n") };
        event = { id: null, type: "message", data: [] };
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue;
      const field = colon < 0 ? line : line.slice(0, colon);
      const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "data") event.data.push(text);
      else if (field === "id") event.id = text;
      else if (field === "event") event.type = text;
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(finish, milliseconds);
    function finish() {
      clearTimeout(timer);
      signal.removeEventListener("abort", finish);
      window.removeEventListener("online", finish);
      resolve();
    }
    signal.addEventListener("abort", finish);
    window.addEventListener("online", finish);
  });
}

/**
 * Follows a stream until `onevent` returns true, and takes it up again wherever it breaks.
 *
 * onevent: (data, type), data parsed from JSON. onlink: (whether it is connected).
 * signal: ends it in silence. Throws a ServiceError that another attempt would only repeat.
 */
export async function follow(path, { onevent, onlink, signal }) {
  let last = null;
  let failures = 0;
  while (!signal.aborted) {
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    signal.addEventListener("abort", abort);
    let silence = setTimeout(abort, SILENCE);
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(abort, SILENCE);
    };
    try {
      const headers = { Accept: "text/event-stream" };
      if (last !== null) headers["Last-Event-ID"] = last;
      const response = await send(path, { headers, signal: attempt.signal });
      onlink(true);
      for await (const event of parsed(response.body, heard)) {
        if (signal.aborted) return;
        failures = 0;
        if (event.id !== null) last = event.id;
        if (onevent(JSON.parse(event.data), event.type)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      const isLasting = error instanceof ServiceError && error.status >= 400
        && error.status < 500 && error.status !== 429;
      // a broken connection is a TypeError or an AbortError of the attempt
      const isLink = error instanceof ServiceError || error instanceof TypeError
        || error.name === "AbortError";
      if (isLasting || !isLink) throw error;
    } finally {
      clearTimeout(silence);
      signal.removeEventListener("abort", abort);
      attempt.abort();
    }
    if (signal.aborted) return;
    onlink(false);
    await pause(Math.min(LONGEST_WAIT, 500 * 2 ** failures), signal);
    failures += 1;
  }
}
