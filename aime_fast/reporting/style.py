"""The style sheet of the report. `--s0` to `--s7` are the colours of lines and components; charts.py uses them by name."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2125; --soft: #6a7178; --rule: #e2e0dc; --good: #2f7d4f; --bad: #b3372f;
  --s0: #2f6cad; --s1: #d1652b; --s2: #3d9970; --s3: #8e5ea2; --s4: #c2a01e; --s5: #4bb3c1; --s6: #b8476b; --s7: #7a7f87; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181b; --card: #1c2024; --ink: #e4e6e8; --soft: #98a0a8; --rule: #30363c; --good: #6fc592; --bad: #f0857b;
  --s0: #6aa5e0; --s1: #f0935c; --s2: #67c79c; --s3: #bb90cf; --s4: #dcbf4f; --s5: #7dd0db; --s6: #e07d9d; --s7: #a2a8af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 40px 28px 80px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; font-weight: 650; }
h2 { font-size: 20px; margin: 44px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); font-weight: 650; }
h3 { font-size: 15px; margin: 28px 0 8px; } h4, h5, h6 { font-size: 14px; margin: 20px 0 6px; color: var(--soft); }
h3::first-letter, h4::first-letter, figcaption::first-letter { text-transform: uppercase; }
main p { max-width: 74ch; } .soft { color: var(--soft); }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; background: var(--card); border: 1px solid var(--rule);
  border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; }
nav { margin: 18px 0 0; } nav a { color: var(--soft); text-decoration: none; margin-right: 18px; }
nav a:hover { color: var(--ink); text-decoration: underline; }
table { border-collapse: collapse; margin: 8px 0 18px; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 22px 5px 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 400; color: var(--soft); } thead th { font-size: 12px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 0 36px;
  margin: 8px 0 18px; font-size: 14px; }
.facts div { display: flex; justify-content: space-between; gap: 24px; padding: 5px 0; border-bottom: 1px solid var(--rule); }
.facts .long { grid-column: 1 / -1; justify-content: flex-start; } .facts .long dt { min-width: 96px; }
.facts .long dd { text-align: left; }
dt { color: var(--soft); } dt::first-letter { text-transform: uppercase; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
tbody th::first-letter { text-transform: uppercase; }
td { overflow-wrap: anywhere; } .good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.unknown { color: var(--soft); }
.finding { border-left: 3px solid var(--bad); padding: 2px 0 2px 14px; margin: 12px 0; max-width: 84ch; }
.finding.over { border-color: var(--rule); } .missing { color: var(--soft); border-left: 3px solid var(--rule); padding-left: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(430px, 100%), 1fr)); gap: 18px; margin: 12px 0; }
.charts > :not(.card) { grid-column: 1 / -1; } .charts > table { width: fit-content; }
.charts > h3, .charts > h4, .charts > .facts { margin: 4px 0 0; }
figure { margin: 0; } .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px 10px; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 6px; }
.chart { width: 100%; height: auto; display: block; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 6px; font-size: 12px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: 14px; margin-right: 6px;
  border-top: 2.5px solid var(--c); vertical-align: 3.5px; }
.key.dashed::before { border-top-style: dashed; } .key.block::before { border-top-width: 9px; width: 9px; vertical-align: 0; }
.key.block.again::before { opacity: 0.45; }
.sheet { margin: 18px 0; } .strip { display: grid; grid-template-columns: max-content 1fr; gap: 2px 10px; }
.strip .side { grid-column: 1; grid-row: 2; display: grid; grid-auto-rows: 1fr; align-items: center; text-align: right; }
.strip .head { grid-column: 2; grid-row: 1; display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; text-align: center; }
.strip .side, .strip .head { font-size: 12px; color: var(--soft); }
.strip img { grid-column: 2; grid-row: 2; width: 100%; image-rendering: pixelated; display: block; }
img { max-width: 100%; }
video { width: 100%; max-width: 760px; display: block; border-radius: 6px; }
"""
