// OpenAI's client for JavaScript.
import OpenAI from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { baseURL, imageUrl, model, question, tell } from './cases.mjs';

const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const card = z.object({ number: z.int().min(0).max(99), colour: z.enum(['red', 'yellow', 'pink']) });
const messages = [
  {
    role: 'user',
    content: [
      { type: 'image_url', image_url: { url: imageUrl } },
      { type: 'text', text: question },
    ],
  },
];

await tell({
  async whole() {
    const answer = await client.chat.completions.create({ model, messages });
    return [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens > 0];
  },
  async streamed() {
    const stream = await client.chat.completions.create({
      model,
      messages,
      stream: true,
      stream_options: { include_usage: true, include_obfuscation: false },
    });
    let text = '';
    let usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? '';
      usage = chunk.usage ?? usage;
    }
    return [text, usage.completion_tokens > 0];
  },
  async streamed_by_its_helper() {
    return await client.chat.completions.stream({ model, messages }).finalContent();
  },
  async parsed_to_a_type() {
    const answer = await client.chat.completions.parse({
      model,
      messages,
      response_format: zodResponseFormat(card, 'card'),
    });
    return answer.choices[0].message.parsed;
  },
  async completion() {
    const answer = await client.completions.create({ model, prompt: 'The number is', max_tokens: 4 });
    return [answer.object, answer.choices[0].text];
  },
  async tools_are_refused_by_name() {
    const tools = [{ type: 'function', function: { name: 'f', parameters: { type: 'object', properties: {} } } }];
    return await client.chat.completions.create({ model, messages, tools }).catch((error) => error.param);
  },
});
