// The swim lanes: one for each worker, its time from left to right, coloured by microbatch. What is not coloured is waiting.

const NUM_COLOURS = 8;
const COMPUTES = new Set(["attention", "ffn", "head"]);
const WAITS = new Set(["wait", "idle"]);

class Strip {
  #canvas; #label; #lanes = null; #zoom = 4;
  static #GUTTER = 84; static #LANE = 26; static #GAP = 7; static #AXIS = 20;

  constructor(canvas, label) {
    this.#canvas = canvas;
    this.#label = label;
    canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX, event.offsetY));
    canvas.addEventListener("pointerleave", () => { label.textContent = "\u00a0"; });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  set zoom(times) { this.#zoom = times; this.draw(); }

  show(lanes) { this.#lanes = lanes; this.draw(); }

  // The CSS variable of a microbatch's colour; the same from answer to answer.
  static colour({ attention_rank, microbatch }) { return `--mb${(microbatch + 3 * attention_rank) % NUM_COLOURS}`; }

  // [first us shown, us shown, pixels each us]
  #scale() {
    const shown = this.#lanes.window_us / this.#zoom;
    return [this.#lanes.window_us - shown, shown, (this.#canvas.clientWidth - Strip.#GUTTER) / shown];
  }

  draw() {
    const lanes = this.#lanes?.lanes ?? [], ratio = window.devicePixelRatio || 1;
    const height = lanes.length * (Strip.#LANE + Strip.#GAP) + Strip.#AXIS;
    this.#canvas.style.height = `${height}px`;
    this.#canvas.width = this.#canvas.clientWidth * ratio;
    this.#canvas.height = height * ratio;
    if (!lanes.length) return;
    const pen = this.#canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    pen.scale(ratio, ratio);
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const ink = (name) => style.getPropertyValue(name);
    const colours = this.#lanes.microbatches.map((owner) => ink(Strip.colour(owner)));
    lanes.forEach((lane, i) => this.#lane(pen, lane, i * (Strip.#LANE + Strip.#GAP), colours, ink));
    this.#axis(pen, height, ink);
  }

  #lane(pen, lane, top, colours, ink) {
    const [from, , pixels] = this.#scale(), { window_us, activities } = this.#lanes;
    pen.fillStyle = ink("--soft");
    pen.textBaseline = "middle";
    pen.fillText(`${lane.role === "ffn" ? "FFN" : lane.role} ${lane.rank}`, 0, top + Strip.#LANE / 2);
    pen.fillStyle = ink("--track");
    pen.fillRect(Strip.#GUTTER, top, this.#canvas.clientWidth - Strip.#GUTTER, Strip.#LANE);
    lane.start_us.forEach((start, i) => {
      const end = lane.start_us[i + 1] ?? window_us, activity = activities[lane.activity[i]];
      if (end <= from || WAITS.has(activity)) return;
      const left = Math.max(start, from), computes = COMPUTES.has(activity), owner = lane.microbatch[i];
      pen.fillStyle = owner >= 0 ? colours[owner] : ink(computes ? "--joined" : "--own");
      pen.globalAlpha = computes ? 1 : 0.5;
      const inset = computes ? 0 : activity === "gather" ? 11 : 5;
      pen.fillRect(Strip.#GUTTER + (left - from) * pixels, top + inset, (end - left) * pixels, Strip.#LANE - 2 * inset);
    });
    pen.globalAlpha = 1;
  }

  #axis(pen, height, ink) {
    const [, shown, pixels] = this.#scale();
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4].find((us) => us * pixels >= 70) ?? 1e5;
    pen.fillStyle = ink("--faint");
    pen.strokeStyle = ink("--line");
    pen.textBaseline = "bottom";
    for (let ago = 0; ago <= shown; ago += every) {
      const x = Strip.#GUTTER + (shown - ago) * pixels;
      pen.textAlign = ago ? (x < Strip.#GUTTER + 24 ? "left" : "center") : "right";
      pen.fillText(ago ? `−${ago / 1000} ms` : "now", x, height);
      pen.beginPath();
      pen.moveTo(x, 0);
      pen.lineTo(x, height - 16);
      pen.stroke();
    }
    pen.textAlign = "left";
  }

  #point(x, y) {
    const lane = this.#lanes?.lanes[Math.floor(y / (Strip.#LANE + Strip.#GAP))];
    if (!lane || x < Strip.#GUTTER) return;
    const [from, , pixels] = this.#scale(), at = from + (x - Strip.#GUTTER) / pixels;
    const i = Math.max(0, lane.start_us.findLastIndex((start) => start <= at)), owner = this.#lanes.microbatches[lane.microbatch[i]];
    const end = lane.start_us[i + 1] ?? this.#lanes.window_us, [length, unit] = duration((end - lane.start_us[i]) / 1e6);
    const whose = owner ? `, microbatch ${owner.microbatch} of attention ${owner.attention_rank}` : "";
    this.#label.textContent = `${lane.role} ${lane.rank}: ${this.#lanes.activities[lane.activity[i]]}${whose}, ${length} ${unit}`;
  }
}
