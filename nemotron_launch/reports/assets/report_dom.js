"use strict";
// What the parts of the page share: elements made without any HTML text, numbers, times, colours.
const Nemotron = {};

Nemotron.element = function (tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) made.style.setProperty(key, one);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
};

Nemotron.plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

Nemotron.number = function (value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en-US");
  if (size >= 1e6) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
};

Nemotron.tick = function (value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size > 0 && size < 1e-3) return String(Number(value.toPrecision(4)).toExponential()).replace("e-", "e\u2212");
  return String(Number(value.toPrecision(6))).replace("-", "\u2212");
};

Nemotron.span = function (seconds) {
  if (seconds === null || seconds === undefined || seconds < 0) return "\u2013";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${Number(seconds.toFixed(1))} s`;
  const minutes = Math.round(seconds / 60);
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (minutes < 60 * 48) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
};

Nemotron.when = function (seconds) {
  if (!seconds) return "";
  const date = new Date(seconds * 1000), two = (value) => String(value).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
};

Nemotron.dark = () => document.documentElement.dataset.theme === "dark";

// Told apart by most readers with impaired colour vision too, for the first eight.
Nemotron.colour = function (index) {
  const light = ["#3f7d00", "#1f6fd6", "#d9480f", "#8839c9", "#00858a", "#c2255c", "#8a6d00", "#52606d"];
  const dark = ["#8fd014", "#6cb0ff", "#ff9457", "#c690ff", "#3fd0d0", "#ff7fa8", "#e5c644", "#a9b5c0"];
  const colours = Nemotron.dark() ? dark : light;
  if (index < colours.length) return colours[index];
  return `hsl(${Math.round((index * 137.5) % 360)} ${Nemotron.dark() ? "70% 68%" : "62% 42%"})`;
};

Nemotron.faded = (colour, share) => `color-mix(in srgb, ${colour} ${Math.round(share * 100)}%, transparent)`;

Nemotron.variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// What a reader has chosen; kept in the browser where it can be.
Nemotron.remembered = {
  get(key) {
    try { return localStorage.getItem(`nemotron-report-${key}`); } catch { return null; }
  },
  set(key, value) {
    try { localStorage.setItem(`nemotron-report-${key}`, value); } catch { /* a page that may not keep anything */ }
  },
};
