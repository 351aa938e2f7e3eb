"use strict";
// Numbers from the server's answers; nothing here knows the page.

// What happened between two answers of one histogram {bounds_s, counts}: the latency in seconds below which a share of it
// lies, in the way of Prometheus (straight between bounds); null where nothing happened.
function quantile(before, after, share) {
  const counts = after.counts.map((count, i) => count - before.counts[i]);
  const wanted = share * counts.at(-1);
  if (!(counts.at(-1) > 0)) return null;
  const i = counts.findIndex((count) => count >= wanted);
  const [low, below] = i ? [after.bounds_s[i - 1], counts[i - 1]] : [0, 0];
  const high = after.bounds_s[i];
  return high === null ? low : low + (high - low) * (wanted - below) / (counts[i] - below);
}

// The mean of several {name: share}; a share that is missing is 0. Largest first.
function meanShares(many) {
  const sums = new Map();
  for (const shares of many)
    for (const [name, share] of Object.entries(shares)) sums.set(name, (sums.get(name) ?? 0) + share / many.length);
  return [...sums].sort((a, b) => b[1] - a[1]);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const sum = (values) => values.reduce((total, value) => total + value, 0);

const whole = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
const short = (value, digits = 1) => value == null ? "–" : value >= 100 ? whole(value) : value.toFixed(digits);

// [number, unit]
function duration(seconds) {
  if (seconds === null) return ["–", ""];
  return seconds < 1 ? [short(1000 * seconds), "ms"] : [seconds.toFixed(2), "s"];
}

function bytes(value) {
  if (value == null) return "–";
  const units = ["B", "kB", "MB", "GB"];
  const power = value < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(value) / 3));
  return `${power ? short(value / 1000 ** power) : whole(value)} ${units[power]}`;
}
