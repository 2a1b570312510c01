// Vercel's AI SDK through @ai-sdk/openai-compatible: node ai_sdk.mjs BASE_URL; prints what it got as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const provider = createOpenAICompatible({ name: "minivllm", baseURL: process.argv[2], includeUsage: true });
const model = provider("smol");
const options = { model, prompt: "What is the capital of France?", temperature: 0, maxOutputTokens: 32, maxRetries: 0 };

const whole = await generateText(options);
const stream = streamText(options);
let streamed = "";
for await (const delta of stream.textStream) {
  streamed += delta;
}
console.log(JSON.stringify({
  whole: whole.text, streamed, finishReason: await stream.finishReason, usage: await stream.usage,
}));
