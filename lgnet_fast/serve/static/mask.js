// The mask as a list of operations in pixels of the picture. One function draws it on the screen and into files.
//
// {kind: "stroke", points: [x, y, ...], width, erase}   {kind: "lasso", points, erase}
// {kind: "rectangle", x, y, width, height, erase}       {kind: "image", image}         {kind: "invert"}

/** Draws operations in order; `context` maps the picture's pixels. */
export function draw(context, operations, colour, size) {
  for (const one of operations) {
    context.save();
    context.fillStyle = context.strokeStyle = colour;
    context.globalCompositeOperation = one.kind === "invert" ? "xor" : one.erase ? "destination-out" : "source-over";
    context.beginPath();
    if (one.kind === "stroke") {
      const [x, y] = one.points;
      if (one.points.length === 2) {
        context.arc(x, y, one.width / 2, 0, 2 * Math.PI);
        context.fill();
      } else {
        context.lineWidth = one.width;
        context.lineCap = context.lineJoin = "round";
        context.moveTo(x, y);
        for (let i = 2; i < one.points.length; i += 2) context.lineTo(one.points[i], one.points[i + 1]);
        context.stroke();
      }
    } else if (one.kind === "lasso") {
      context.moveTo(one.points[0], one.points[1]);
      for (let i = 2; i < one.points.length; i += 2) context.lineTo(one.points[i], one.points[i + 1]);
      context.fill("evenodd");
    } else if (one.kind === "rectangle") {
      context.fillRect(one.x, one.y, one.width, one.height);
    } else if (one.kind === "invert") {
      context.fillRect(0, 0, size.width, size.height);
    } else {
      context.drawImage(one.image, 0, 0);
    }
    context.restore();
  }
}

/** The box {x, y, width, height} that operations can reach inside a picture, or null. */
export function reach(operations, size) {
  let box = null;
  const add = (left, top, right, bottom) => {
    box = box || [Infinity, Infinity, -Infinity, -Infinity];
    box = [Math.min(box[0], left), Math.min(box[1], top), Math.max(box[2], right), Math.max(box[3], bottom)];
  };
  for (const one of operations) {
    if (one.kind === "invert" || one.kind === "image") add(0, 0, size.width, size.height);
    else if (one.erase) continue;
    else if (one.kind === "rectangle") add(one.x, one.y, one.x + one.width, one.y + one.height);
    else {
      const margin = one.kind === "stroke" ? one.width / 2 + 1 : 1;
      for (let i = 0; i < one.points.length; i += 2) {
        const [x, y] = [one.points[i], one.points[i + 1]];
        add(x - margin, y - margin, x + margin, y + margin);
      }
    }
  }
  if (!box) return null;
  const left = Math.max(0, Math.floor(box[0]));
  const top = Math.max(0, Math.floor(box[1]));
  const width = Math.min(size.width, Math.ceil(box[2])) - left;
  const height = Math.min(size.height, Math.ceil(box[3])) - top;
  return width > 0 && height > 0 ? { x: left, y: top, width, height } : null;
}

// Side of a canvas in pixels. On some phones a canvas beyond a much larger limit is empty, without an error.
const TILE = 512;

/** The mask in a box as rows of bits, most significant first, 1 = hole (alpha at least 128); null if there is none. */
function bits(operations, box, size) {
  const canvas = new OffscreenCanvas(Math.min(TILE, box.width), Math.min(TILE, box.height));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const stride = Math.ceil(box.width / 8);
  const rows = new Uint8Array(stride * box.height);
  let any = false;
  for (let top = 0; top < box.height; top += TILE) {
    for (let left = 0; left < box.width; left += TILE) {
      const width = Math.min(TILE, box.width - left);
      const height = Math.min(TILE, box.height - top);
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, TILE, TILE);
      context.setTransform(1, 0, 0, 1, -box.x - left, -box.y - top);
      draw(context, operations, "#fff", size);
      const levels = context.getImageData(0, 0, width, height).data;
      for (let y = 0, at = 3; y < height; y++) {
        const row = (top + y) * stride;
        for (let x = 0; x < width; x++, at += 4) {
          if (levels[at] >= 128) {
            rows[row + ((left + x) >> 3)] |= 128 >> ((left + x) & 7);
            any = true;
          }
        }
      }
    }
  }
  return any ? rows : null;
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

function chunk(name, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) bytes[4 + i] = name.charCodeAt(i);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < 8 + data.length; i++) crc = CRC[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  view.setUint32(8 + data.length, ~crc >>> 0);
  return bytes;
}

/** The mask in a box as a PNG of one bit per pixel, white = hole; null if no pixel is hole. */
export async function encode(operations, box, size) {
  const rows = bits(operations, box, size);
  if (!rows) return null;
  const stride = Math.ceil(box.width / 8);
  const filtered = new Uint8Array((stride + 1) * box.height);
  for (let y = 0; y < box.height; y++) filtered.set(rows.subarray(y * stride, (y + 1) * stride), y * (stride + 1) + 1);
  const packed = new Blob([filtered]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, box.width);
  view.setUint32(4, box.height);
  header[8] = 1; // bits a sample; grey, deflate, no interlace
  return new Blob(
    [
      new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]),
      chunk("IHDR", header),
      chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
      chunk("IEND", new Uint8Array()),
    ],
    { type: "image/png" },
  );
}
