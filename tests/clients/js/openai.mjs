// openai for JavaScript: node openai.mjs BASE_URL; prints what it got as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const models = await client.models.list();
const model = models.data[0].id;

const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 32 });
const runner = client.chat.completions.stream({
  model, messages, temperature: 0, max_tokens: 32, stream_options: { include_usage: true },
});
let streamed = "";
runner.on("content", (delta) => { streamed += delta; });
const final = await runner.finalChatCompletion();

let text = "";
for await (const chunk of await client.completions.create({
  model, prompt: "One, two, three,", temperature: 0, max_tokens: 4, stream: true,
})) {
  text += chunk.choices[0].text;
}

let error;
try {
  await client.chat.completions.create({ model: "gpt-5", messages });
} catch (caught) {
  error = { status: caught.status, code: caught.code, name: caught.constructor.name };
}
console.log(JSON.stringify({
  model, whole: whole.choices[0].message.content, streamed, final: final.choices[0].message.content,
  usage: final.usage, text, error,
}));
