// How numbers are written.

export function plural(count, noun) {
  // the first number that is written in a language's way costs some milliseconds
  return `${count < 1000 ? count : count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

const STAGES = {
  video: "Read video", vae: "VAE", text: "Text", memory: "Recall", sampling: "Sampling",
};

export const stageWords = (stage) => STAGES[stage] ?? stage;

/** "turn 1, turn 2 and turn 3" */
export const list = (words) => new Intl.ListFormat("en").format(words);

export function seconds(value) {
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 99.5) return `${Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 100 ? `${minutes} min` : `${(value / 3600).toFixed(1)} h`;
}

function scaled(value, units, step) {
  let index = 0;
  while (value >= step && index < units.length - 1) {
    value /= step;
    index += 1;
  }
  const digits = index === 0 || value >= 99.5 ? 0 : value >= 9.95 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[index]}`;
}

export const bytes = (value) => scaled(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
export const flops = (value) =>
  scaled(value, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"], 1000);
export const percent = (share) => `${Math.round(share * 100)}\u00a0%`;

/** A number with a true minus and no needless digits. */
export function signed(value) {
  return String(Math.round(value * 100) / 100).replace("-", "−");
}

export function ago(unixSeconds) {
  const past = Date.now() / 1000 - unixSeconds;
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return new Date(unixSeconds * 1000).toLocaleDateString();
}
