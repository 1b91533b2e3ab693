"""A text colored by the loops that each token needs, as one HTML page without external resources.

All text is escaped, and data is read by the page's script as JSON, so nothing in a text or a vocabulary is markup.
"""

import html
import json
import math
from string import Template

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.evaluate.depth_text import TextDepths
from mythos_dist.units import count

RULES = {
    "latent": "change of the hidden state below",
    "kl": "KL divergence from the loop before below",
    "halting": "cumulative halting probability at least",
}


def depth_page(title: str, depths: TextDepths, tokenizer: Tokenizer, criterion: str, threshold: float) -> str:
    """The page. `criterion`, `threshold`: with which it opens; a reader can change both."""
    n_loops = len(depths.agreement)
    exits = depths.exits(criterion, threshold)
    mean = sum(exits) / len(exits)
    spans = []
    for i, (piece, loop) in enumerate(zip(depths.pieces, exits, strict=True)):
        # White space at a line's end would not be visible.
        text = html.escape(piece).replace("\n", "↵\n") or "·"
        spans.append(f'<span tabindex="0" class="t d{loop}" data-i="{i}">{text}</span>')
    left_out = (
        f"; {count(depths.tokens_left_out, 'token')} beyond the context left out" if depths.tokens_left_out else ""
    )
    return _PAGE.substitute(
        title=html.escape(title),
        summary=html.escape(f"{count(len(exits), 'token')}, {count(n_loops, 'loop')}{left_out}"),
        colors=_colors(n_loops),
        options="".join(
            f'<option value="{name}"{" selected" if name == criterion else ""}>{html.escape(RULES[name])}</option>'
            for name in depths.measures
        ),
        threshold=f"{threshold:g}",
        mean=f"{mean:.2f}",
        legend="".join(f'<span class="t d{loop}">{loop}</span>' for loop in range(1, n_loops + 1)),
        chart=_chart(depths.agreement),
        text="".join(spans),
        data=_script_json(_data(depths, tokenizer)),
    )


def _data(depths: TextDepths, tokenizer: Tokenizer) -> dict:
    """What the script reads: measures by criterion and loop, and the most likely next tokens of each loop."""
    vocabulary = {token: tokenizer.decode([token]) or f"<{token}>" for token in depths.top_tokens.unique().tolist()}
    return {
        "measures": {
            name: [[_short(x) for x in row] for row in value.tolist()] for name, value in depths.measures.items()
        },
        "tokens": depths.top_tokens.tolist(),
        "probabilities": [[[_short(x) for x in one] for one in row] for row in depths.top_probabilities.tolist()],
        "vocabulary": vocabulary,
        "thresholds": depths.thresholds,
    }


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _script_json(data: dict) -> str:
    """JSON that cannot end the script element that it is in."""
    return json.dumps(data, ensure_ascii=True).replace("<", "\\u003c").replace("&", "\\u0026")


def _colors(n_loops: int) -> str:
    """A class per loop: pale to strong, in light and in dark."""
    rules = {"light": [], "dark": []}
    for loop in range(1, n_loops + 1):
        share = (loop - 1) / max(1, n_loops - 1)
        hue = 200 + 90 * share  # blue to violet
        rules["light"].append(f".d{loop}{{background:hsl({hue:.0f} 75% {95 - 30 * share:.0f}%)}}")
        rules["dark"].append(f".d{loop}{{background:hsl({hue:.0f} 55% {14 + 30 * share:.0f}%)}}")
    return f"{''.join(rules['light'])}@media(prefers-color-scheme:dark){{{''.join(rules['dark'])}}}"


def _chart(agreement: list[float]) -> str:
    """Agreement with the deepest loop over loops, as SVG."""
    width, height, left, bottom = 360, 150, 40, 30
    span = max(1, len(agreement) - 1)
    points = [
        (left + (width - left - 10) * i / span, 10 + (height - bottom - 10) * (1 - value))
        for i, value in enumerate(agreement)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>loop {i + 1}: {agreement[i]:.1%}</title></circle>'
        for i, (x, y) in enumerate(points)
    )
    every = -(-len(points) // 8)
    labels = "".join(
        f'<text x="{x:.1f}" y="{height - 17}" text-anchor="middle">{i + 1}</text>'
        for i, (x, _) in enumerate(points)
        if (len(points) - 1 - i) % every == 0
    )
    for value in (0.0, 0.5, 1.0):
        y = 10 + (height - bottom - 10) * (1 - value)
        labels += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.0%}</text>'
        labels += f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="agreement with the deepest loop by loop">'
        f'{labels}<polyline points="{line}"/>{dots}'
        f'<text x="{(left + width - 10) / 2}" y="{height - 3}" text-anchor="middle">loop</text></svg>'
    )


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--line:#ccc;--mark:#4455cc}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#161618;--line:#444;--mark:#9aa8ff}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.3rem;margin:0} h2{font-size:1rem;margin:1.5rem 0 .3rem}
#text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;border:1px solid var(--line);border-radius:6px;
padding:.8rem}
.t{border-radius:3px;padding:.1em 0} .legend .t{padding:.1em .4em;margin-right:2px;display:inline-block}
#text .t:hover,#text .t:focus{outline:2px solid var(--mark)}
#tip{position:fixed;display:none;background:var(--paper);border:1px solid var(--line);border-radius:6px;padding:.5rem;
font-size:.8rem;box-shadow:0 2px 10px #0006;max-height:80vh;overflow:auto;z-index:1}
#tip td{padding:0 .5em;white-space:pre} #tip .exit{font-weight:bold;color:var(--mark)}
svg{width:24rem;max-width:100%;font-size:10px} svg text{fill:var(--ink)} .grid{stroke:var(--line)}
polyline{fill:none;stroke:var(--mark);stroke-width:2} circle{fill:var(--mark)}
input{width:7em}
$colors
</style>
<h1>$title</h1>
<p>$summary. A token's color is the loop after which its position would stop. Point at a token to see the most likely
next tokens after each loop.</p>
<p><label>Stop: <select id="criterion">$options</select></label>
<label><input id="threshold" type="number" step="any" value="$threshold" aria-label="threshold"></label>
mean <b id="mean">$mean</b> loops</p>
<div class="legend">loop $legend</div>
<h2>Text</h2>
<div id="text">$text</div>
<h2>Tokens whose prediction is that of the deepest loop</h2>
$chart
<div id="tip" role="tooltip"></div>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const spans = [...document.querySelectorAll("#text .t")], tip = document.getElementById("tip");
const criterion = document.getElementById("criterion"), threshold = document.getElementById("threshold");
const count = data.tokens.length;
function exitOf(i) {
  const rows = data.measures[criterion.value], limit = Number(threshold.value);
  for (let t = 0; t < count - 1; t++) {
    const value = rows[t][i];
    if (value !== null && (criterion.value === "halting" ? value >= limit : value < limit)) return t + 1;
  }
  return count;
}
function recolor() {
  let sum = 0;
  for (const span of spans) {
    const loop = exitOf(Number(span.dataset.i));
    span.className = "t d" + loop;
    sum += loop;
  }
  document.getElementById("mean").textContent = (sum / spans.length).toFixed(2);
}
function show(span) {
  const i = Number(span.dataset.i), exit = exitOf(i), table = document.createElement("table");
  for (let t = 0; t < count; t++) {
    const row = table.insertRow(), value = data.measures[criterion.value][t][i];
    row.className = t + 1 === exit ? "exit" : "";
    row.insertCell().textContent = t + 1;
    row.insertCell().textContent = value === null ? "" : value.toPrecision(2);
    data.tokens[t][i].forEach((token, k) => {
      const p = data.probabilities[t][i][k];
      row.insertCell().textContent = JSON.stringify(data.vocabulary[token]) + " " + (100 * (p ?? NaN)).toFixed(1) + "%";
    });
  }
  tip.replaceChildren(table);
  tip.style.display = "block";
  const at = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(at.left, innerWidth - size.width - 4)) + "px";
  const below = at.bottom + size.height + 6 < innerHeight;
  tip.style.top = (below ? at.bottom + 6 : Math.max(4, at.top - size.height - 6)) + "px";
}
for (const span of spans) {
  for (const name of ["mouseenter", "focus"]) span.addEventListener(name, () => show(span));
  for (const name of ["mouseleave", "blur"]) span.addEventListener(name, () => { tip.style.display = "none"; });
}
criterion.addEventListener("change", () => { threshold.value = data.thresholds[criterion.value]; recolor(); });
threshold.addEventListener("input", recolor);
</script>
</html>
""")
