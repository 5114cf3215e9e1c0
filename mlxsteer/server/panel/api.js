// The server's API: requests, the key, errors, and the stream of an answer.

const KEY = "mlxsteer.key";
const GONE = "The server cannot be reached. Is `mlxsteer serve` still running?";
const BROKEN = "The connection broke before the answer was complete.";

/** status: of HTTP, 0 where the server did not answer. wait: seconds that it asks to wait. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null, wait = null) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

let key = sessionStorage.getItem(KEY);
let asking = null;
let askForKey = async () => null;

/** `ask` gives a promise of a key, or of null when there is none to be had. */
export const whenKeyIsNeeded = (ask) => (askForKey = ask);

async function newKey(refused) {
  if (key !== refused) return true;
  asking ??= askForKey().finally(() => (asking = null));
  const given = await asking;
  if (!given) return false;
  key = given;
  sessionStorage.setItem(KEY, key);
  return true;
}

async function request(method, path, { body, signal, quiet = false } = {}) {
  for (;;) {
    const used = key;
    const headers = { ...(used && { Authorization: `Bearer ${used}` }) };
    if (body) headers["Content-Type"] = "application/json";
    const reply = await reach(path, { method, headers, signal, body: body && JSON.stringify(body) });
    if (reply.ok) return reply;
    if (reply.status !== 401 || quiet || !(await newKey(used))) throw await errorOf(reply);
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(GONE);
  }
}

async function errorOf(reply) {
  const told = await reply.json().then((data) => data.error, () => null);
  const wait = Number(reply.headers.get("Retry-After")) || null;
  return new ApiError(told?.message ?? `The server says ${reply.status}.`, reply.status, told?.code, wait);
}

const json = async (...given) => (await request(...given)).json();
const at = encodeURIComponent;

export const getStatus = (quiet) => json("GET", "/v1/steering/status", { quiet });
export const getVectors = () => json("GET", "/v1/steering/vectors");
export const getVector = (name) => json("GET", `/v1/steering/vectors/${at(name)}`);
export const getFeatures = (words, offset, signal) =>
  json("GET", `/v1/steering/features?q=${at(words)}&offset=${offset}`, { signal });
export const makeVector = (body) => json("POST", "/v1/steering/vectors", { body });
export const getJobs = () => json("GET", "/v1/steering/jobs");
export const getJob = (id) => json("GET", `/v1/steering/jobs/${at(id)}`, { quiet: true });
export const cancelJob = (id) => json("DELETE", `/v1/steering/jobs/${at(id)}`);
export const steerAnswer = (id, steer) =>
  json("PATCH", `/v1/steering/generations/${at(id)}`, { body: { steer } });

/**
 * Ask for an answer. Gives its id, what was warned of, and its chunks as they come.
 * ApiError when it cannot be had; the chunks throw one when it ends early.
 */
export async function openAnswer(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const reply = await request("POST", "/v1/chat/completions", { body: asked, signal });
  const warnings = reply.headers.get("X-Mlxsteer-Warnings");
  return {
    id: reply.headers.get("X-Mlxsteer-Generation"),
    warnings: warnings ? warnings.split(" | ") : [],
    chunks: chunksOf(reply),
  };
}

async function* chunksOf(reply) {
  for await (const data of eventsOf(reply)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 500, chunk.error.code);
    yield chunk;
  }
  throw new ApiError(BROKEN);
}

async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ApiError(BROKEN);
    });
    if (done) return;
    const frames = (waiting + value).split("\n\n");
    waiting = frames.pop();
    for (const frame of frames) {
      if (frame.startsWith("data: ")) yield frame.slice("data: ".length);
    }
  }
}
