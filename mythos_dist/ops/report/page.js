"use strict";
// Draws the charts of a report. `runs`: what run.page_data returns, one per run.
const runs = JSON.parse(document.getElementById("data").textContent);
const colours = ["#2a6fdb", "#e07b00", "#1a9c5b", "#c2418f", "#7a52cc", "#0c9bb3", "#a3760f", "#d1402f"];
const symbols = { restart: "triangle-up", decision: "x", skipped: "x-thin-open", phase: "line-ns-open", stage: "star" };
const axes = { step: "step", tokens: "tokens", hours: "hours since the first step" };
const root = document.documentElement;
const settings = { x: "step", smooth: 1 };
const charts = [];

const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const several = runs.length > 1;
const has = (field) => runs.some((run) => run.curves[field]);

function layout(extra) {
  const line = { gridcolor: style("--grid"), zerolinecolor: style("--line"), linecolor: style("--line") };
  const base = {
    margin: { l: 64, r: 18, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style("--text"), size: 12, family: "inherit" }, hovermode: "x unified", showlegend: true,
    legend: { orientation: "h", y: 1.12, x: 0 }, hoverlabel: { bgcolor: style("--card"), font: { color: style("--text") } },
    xaxis: { ...line, title: { text: axes[settings.x] }, exponentformat: "SI" },
    yaxis: { ...line, exponentformat: "SI" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--faint"), activecolor: style("--accent") },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
  };
  return { ...base, ...extra, xaxis: { ...base.xaxis, ...extra.xaxis }, yaxis: { ...base.yaxis, ...extra.yaxis } };
}

function smoothed(values) {
  if (settings.smooth <= 1) return values;
  const decay = 1 - 1 / settings.smooth;
  let mean = null;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean === null ? value : decay * mean + (1 - decay) * value;
    return mean;
  });
}

// The x of a step of a run: of the first point at or after it.
function position(run, step) {
  if (settings.x === "step") return step;
  const i = run.x.step.findIndex((at) => at >= step);
  const last = run.x.step.length - 1;
  return last < 0 ? null : run.x[settings.x][step === 0 ? 0 : i < 0 ? last : i];
}

function curve(run, index, field, options = {}) {
  const values = run.curves[field];
  if (!values) return [];
  const colour = options.colour || colours[index % colours.length];
  const scale = options.scale || 1;
  const name = [several ? run.name : "", options.label || ""].filter(Boolean).join(" ") || options.title;
  const part = (key) => (values[key] || values.mean).map((value) => (value === null ? null : value * scale));
  const x = run.x[settings.x];
  const traces = [];
  if (values.low && !options.plain) {
    const band = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: name };
    traces.push({ ...band, y: part("low") }, { ...band, y: part("high"), fill: "tonexty", fillcolor: colour + "26" });
  }
  const y = options.smooth ? smoothed(part(options.part || "mean")) : part(options.part || "mean");
  traces.push({ x, y, name, legendgroup: name, mode: y.length === 1 ? "markers" : "lines",
    line: { color: colour, width: 1.6, dash: options.dash }, hovertemplate: `%{y:.5~g}${options.unit || ""}` });
  return traces;
}

const markColour = (kind) => style(kind === "phase" || kind === "stage" ? "--faint" : "--bad");

function marks() {
  return runs.flatMap((run) => Object.keys(symbols).map((kind) => {
    const events = run.events.filter((event) => event.kind === kind);
    return { x: events.map((event) => position(run, event.step)), y: events.map(() => 0.03), yaxis: "y2", mode: "markers",
      marker: { symbol: symbols[kind], size: 9, color: markColour(kind), line: { width: 1.5, color: markColour(kind) } },
      text: events.map((event) => `${several ? run.name + ": " : ""}step ${event.step}: ${event.text}`),
      hovertemplate: "%{text}<extra></extra>", name: kind, showlegend: false };
  })).filter((trace) => trace.x.length);
}

function addChart(id, title, note, traces, extra = () => ({})) {
  const box = document.createElement("section");
  box.className = "chart";
  box.innerHTML = "<h3></h3><p></p><div class=plot></div>";
  box.querySelector("h3").textContent = title;
  box.querySelector("p").textContent = note;
  const plot = box.querySelector(".plot");
  plot.id = id;
  document.getElementById("charts").append(box);
  charts.push({ plot, traces, extra, box });
  return box;
}

function draw() {
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  for (const chart of charts) Plotly.react(chart.plot, chart.traces(), layout(chart.extra()), config);
}

// A heat map fills its plot: the buttons of the chart are above it, and each loop has a label where there is room.
const heatmapLayout = (loops, xaxis) => ({ margin: { l: 64, r: 18, t: 34, b: 44 }, hovermode: "closest", showlegend: false,
  xaxis, yaxis: { title: { text: "loop" }, dtick: loops > 12 ? undefined : 1 } });

const all = (field, options) => runs.flatMap((run, i) => curve(run, i, field, options));
const lineChart = (id, title, note, traces, extra) => addChart(id, title, note, () => [...traces(), ...marks()], extra);

function heldout() {
  return runs.flatMap((run, i) => ["heldout_loss", "heldout_loss_average"].map((key, k) => {
    const lines = run.evaluations.filter((line) => typeof line[key] === "number");
    const label = k ? "held out, average of the weights" : "held out";
    return { x: lines.map((line) => position(run, line.step)), y: lines.map((line) => line[key]), mode: "lines+markers",
      name: (several ? run.name + " " : "") + label, line: { color: colours[i % colours.length], dash: k ? "dot" : "dash", width: 1.4 },
      marker: { size: 6 }, hovertemplate: "%{y:.5~g}" };
  })).filter((trace) => trace.x.length);
}

function byLoops() {
  const shown = runs.flatMap((run) => {
    const lines = run.evaluations.filter((line) => line.by_loops);
    const every = Math.max(1, Math.ceil(lines.length / (several ? 1 : 8)));
    return lines.filter((_, i) => (lines.length - 1 - i) % every === 0).map((line) => [run, line]);
  });
  return shown.map(([run, line], i) => {
    const loops = Object.keys(line.by_loops).map(Number).sort((a, b) => a - b);
    return { x: loops, y: loops.map((n) => line.by_loops[n].loss), mode: "lines+markers",
      name: (several ? run.name + ", " : "") + "step " + line.step,
      line: { color: several ? colours[i % colours.length] : `hsl(${215 + (100 * i) / shown.length}, 65%, 55%)` }, hovertemplate: "%{y:.5~g}" };
  });
}

function addProbes(run) {
  if (!run.probes.length) return;
  const names = [...new Set(run.probes.flatMap((probe) => Object.keys(probe)))].filter((name) => Array.isArray(run.probes.at(-1)[name]));
  let shown = names[0];
  const box = addChart("probes-" + runs.indexOf(run), "Telemetry of the loops" + (several ? ": " + run.name : ""), "", () => {
    const deepest = Math.max(...run.probes.map((probe) => (probe[shown] || []).length));
    const rows = [...Array(deepest).keys()];
    return [{ type: "heatmap", x: run.probes.map((probe) => position(run, probe.step)), y: rows.map((t) => t + 1),
      z: rows.map((t) => run.probes.map((probe) => (probe[shown] || [])[t] ?? null)), colorscale: "Viridis",
      hovertemplate: "%{x}, loop %{y}: %{z:.4~g}<extra></extra>" }];
  }, () => {
    const deepest = Math.max(...run.probes.map((probe) => (probe[shown] || []).length));
    const only = run.probes.length === 1 ? { tickvals: [position(run, run.probes[0].step)] } : {}; // one column, one tick
    return heatmapLayout(deepest, only);
  });
  const select = document.createElement("select");
  select.append(...names.map((name) => new Option(name.replaceAll("_", " "), name)));
  select.onchange = () => { shown = select.value; draw(); };
  box.querySelector("p").append(select);
}

function addExpertLoad(run) {
  const load = run.expert_load.load;
  if (!load) return;
  addChart("experts-" + runs.indexOf(run), "Load of the experts after step " + run.expert_load.step + (several ? ": " + run.name : ""),
    "tokens of an expert in a loop, times the mean; 1 is even, 0 is idle", () => [{ type: "heatmap", z: load,
      x: load[0].map((_, i) => i), y: load.map((_, t) => t + 1), zmin: 0, colorscale: "Viridis",
      hovertemplate: "expert %{x}, loop %{y}: %{z:.3~g}<extra></extra>" }],
    () => heatmapLayout(load.length, { title: { text: "expert" }, dtick: load[0].length > 16 ? undefined : 1 }));
}

function addCharts() {
  lineChart("loss", "Loss", "nats per token; a band is the range of the steps that a point stands for", () =>
    [...all("loss", { title: "training", label: several ? "" : "training", smooth: true }), ...heldout()], () => ({ yaxis: { type: settings.log ? "log" : "linear" } }));
  if (runs.some((run) => run.evaluations.some((line) => line.by_loops)))
    addChart("by-loops", "Held-out loss by number of loops", "evaluations with loops.sweep", byLoops,
      () => ({ xaxis: { title: { text: "loops" }, type: "log", dtick: Math.log10(2) }, hovermode: "closest" }));
  lineChart("lr", "Learning rate", "marks: phases, stages, restarts, skipped and repeated steps", () => all("lr", { title: "learning rate" }), () => ({ yaxis: { exponentformat: "e", rangemode: "tozero" } }));
  lineChart("grad_norm", "Gradient norm", "before clipping", () => all("grad_norm", { title: "gradient norm" }), () => ({ yaxis: { type: "log", nticks: 6 } }));
  lineChart("tokens_per_second", "Tokens per second", "", () => all("tokens_per_second", { title: "tokens/s", smooth: true }), () => ({ yaxis: { rangemode: "tozero" } }));
  if (has("mfu")) lineChart("mfu", "Model FLOPs utilization", "of the peak of all ranks", () => all("mfu", { title: "MFU", scale: 100, unit: " %", smooth: true }), () => ({ yaxis: { ticksuffix: " %", rangemode: "tozero" } }));
  lineChart("step_seconds", "Step time", "seconds: median, 95th percentile, waiting for data", () => [
    ...all("step_seconds", { plain: true, part: "median", label: "median" }),
    ...all("step_seconds", { plain: true, part: "p95", label: "p95", dash: "dot" }),
    ...all("data_wait_seconds", { plain: true, label: "waiting for data", dash: "dash", colour: several ? undefined : "#e07b00" }),
    ...planned("step_seconds")], () => ({ yaxis: { rangemode: "tozero" } }));
  if (has("memory_gb")) lineChart("memory_gb", "Memory", "GB of the rank that holds most: on a GPU in PyTorch's allocator, on a CPU in the process", () => [
    ...all("memory_gb", { title: "memory" }), ...planned("memory_gb")], () => ({ yaxis: { rangemode: "tozero" } }));
  if (has("expert_load_max")) lineChart("expert_load_max", "Busiest expert", "its tokens, times the mean", () => all("expert_load_max", { title: "busiest expert" }), () => ({ yaxis: { rangemode: "tozero" } }));
  if (runs.some((run) => run.curves.n_loops && new Set(run.curves.n_loops.mean).size > 1))
    lineChart("loops", "Loops of the steps", "", () => all("n_loops", { title: "loops" }), () => ({ yaxis: { rangemode: "tozero" } }));
  if (runs.some((run) => run.curves.global_batch && new Set(run.curves.global_batch.mean).size > 1))
    lineChart("global_batch", "Global batch", "sequences", () => all("global_batch", { title: "global batch" }));
  runs.forEach(addExpertLoad);
  runs.forEach(addProbes);
}

function planned(field) {
  return runs.flatMap((run, i) => typeof run.planned[field] !== "number" ? [] : [{
    x: [run.x[settings.x][0], run.x[settings.x].at(-1)], y: [run.planned[field], run.planned[field]], mode: "lines",
    name: (several ? run.name + " " : "") + "planned", line: { color: colours[i % colours.length], dash: "longdash", width: 1 } }]);
}

function setTheme(theme) {
  root.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "light" : "dark";
}

function byId(id, event, handle) { document.getElementById(id).addEventListener(event, handle); }

setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
addCharts();
draw();
byId("x", "change", (event) => { settings.x = event.target.value; draw(); });
byId("smooth", "input", (event) => { settings.smooth = Number(event.target.value); draw(); });
byId("log", "change", (event) => { settings.log = event.target.checked; draw(); });
byId("theme", "click", () => { setTheme(root.dataset.theme === "dark" ? "light" : "dark"); draw(); });
byId("filter", "input", (event) => {
  for (const row of document.querySelectorAll("#settings tbody tr")) row.hidden = !row.cells[0].textContent.includes(event.target.value);
});
let before = null;
window.addEventListener("beforeprint", () => { before = root.dataset.theme; setTheme("light"); draw(); });
window.addEventListener("afterprint", () => { setTheme(before); draw(); });
const refresh = Number(root.dataset.refresh || 0);
if (refresh) {
  let touched = false;
  for (const chart of charts) chart.plot.on("plotly_relayout", () => { touched = true; });
  setInterval(() => { if (!touched && !document.hidden) location.reload(); }, refresh * 1000);
}
root.dataset.drawn = "yes";
