"use strict";
// Before anything is painted: light or dark, as the reader chose it here or in a report, else as the system is.
(() => {
  let kept = null;
  try { kept = localStorage.getItem("nemotron-report-theme"); } catch { /* a browser that keeps nothing */ }
  document.documentElement.dataset.theme = kept || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
})();
