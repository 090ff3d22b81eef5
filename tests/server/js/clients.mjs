// What JavaScript's clients make of the server's answers: `node clients.mjs ADDRESS KEY WHAT` prints one JSON document.

import Anthropic from "@anthropic-ai/sdk";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";

const [address, apiKey, what] = process.argv.slice(2);
const claude = new Anthropic({ baseURL: address, apiKey, maxRetries: 0 });
const model = createOpenAICompatible({ name: "kvcompose", baseURL: `${address}/v1`, apiKey, includeUsage: true, supportsStructuredOutputs: true })("tiny");

const question = "Hello, who are you?";
const city = { type: "object", properties: { city: { enum: ["Rome"] } }, required: ["city"], additionalProperties: false };
const asked = { model: "tiny", max_tokens: 12, messages: [{ role: "user", content: question }] };
const claudesTools = { max_tokens: 120, tools: [{ name: "weather", description: "Tells it.", input_schema: city }], tool_choice: { type: "any" } };
const options = { model, prompt: question, maxOutputTokens: 12, temperature: 0, maxRetries: 0 };
const tools = { weather: tool({ description: "Tells it.", inputSchema: jsonSchema(city), execute: async ({ city }) => `${city} is warm` }) };

const error = (failure) => ({ status: failure.status ?? failure.statusCode, message: failure.message });

async function streamed(result) {
  let text = "";
  for await (const piece of result.textStream) text += piece;
  return text;
}

const run = {
  "anthropic text": async () => {
    const whole = await claude.messages.create({ ...asked, temperature: 0 });
    const stream = claude.messages.stream({ ...asked, temperature: 0 });
    let text = "";
    stream.on("text", (piece) => { text += piece; });
    const final = await stream.finalMessage();
    const counted = await claude.messages.countTokens({ model: "tiny", messages: asked.messages });
    return { whole, text, final, counted };
  },
  "anthropic tool": async () => ({
    whole: await claude.messages.create({ ...asked, ...claudesTools }),
    final: await claude.messages.stream({ ...asked, ...claudesTools }).finalMessage(),
  }),
  "anthropic error": () => claude.messages.create({ ...asked, messages: [{ role: "user", content: "x".repeat(3000) }] }).catch(error),
  "ai text": async () => {
    const { text, usage, finishReason } = await generateText(options);
    const stream = streamText(options);
    return { text, usage, finishReason, streamed: await streamed(stream), streamedUsage: await stream.usage };
  },
  "ai tool": async () => {
    const { toolCalls, toolResults } = await generateText({ ...options, maxOutputTokens: 120, tools, toolChoice: "required" });
    const stream = streamText({ ...options, maxOutputTokens: 120, tools, toolChoice: "required" });
    await streamed(stream);
    return { toolCalls, toolResults, streamedCalls: await stream.toolCalls };
  },
  "ai json": async () => (await generateText({ ...options, maxOutputTokens: 80, output: Output.object({ schema: jsonSchema(city) }) })).output,
  "ai error": () => generateText({ ...options, prompt: "x".repeat(3000) }).catch(error),
};

console.log(JSON.stringify(await run[what]()));
