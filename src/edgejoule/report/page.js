// What the scripts of all pages share: the JSON in #data, the style's colours, and how a plot is shown. Asks nothing of any network.
const page = (function () {
  "use strict";
  return {
    data: JSON.parse(document.getElementById("data").textContent),
    css: (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim(),
    // Plotly reads a little HTML in its texts: names must stay names.
    plain: (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"),
    show: (plot, traces, layout, narrow) => Plotly.react(plot, traces, layout, {
      displaylogo: false, responsive: false, displayModeBar: narrow ? false : "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // named one by one: the default set offers to upload the plot
    }),
    // Draws every plot now, and again when the page has another width or colour scheme.
    everyPlot: (draw) => {
      const all = () => document.querySelectorAll(".plot").forEach(draw);
      let waiting = 0;
      all();
      window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(all, 150); });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
    },
  };
}());
