// What the scripts of all pages share: the JSON in #data, the style's colours, and how a plot is shown. Asks nothing of any network.
const page = (function () {
  "use strict";
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return {
    data: JSON.parse(document.getElementById("data").textContent),
    css,
    // The page's colours and letters for a plot now: sizes, an axis, and what its layout begins with.
    look: (narrow) => {
      const font = narrow ? 11 : 12, ink = css("--ink"), soft = css("--soft"), line = css("--line");
      const family = getComputedStyle(document.body).fontFamily;
      return {
        font, ink, soft, line,
        axis: { gridcolor: line, linecolor: line, zeroline: false, ticks: "", automargin: false, tickfont: { size: font } },
        layout: {
          paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", dragmode: narrow ? false : "zoom",
          font: { family, size: font, color: soft },
          hoverlabel: { align: "left", bgcolor: css("--card"), bordercolor: line, font: { family, color: ink, size: 12 } },
          modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
        },
      };
    },
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
