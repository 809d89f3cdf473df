// Vercel's AI SDK, by its provider for OpenAI-compatible servers and by OpenAI's own with another address.
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, Output, streamObject, streamText } from 'ai';
import { z } from 'zod';
import { baseURL, image, model, question, tell } from './cases.mjs';

const compatible = createOpenAICompatible({
  name: 'focusllava',
  baseURL,
  apiKey: 'none',
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: 'none' });
const schema = z.object({ number: z.int().min(0).max(99), colour: z.enum(['red', 'yellow', 'pink']) });
const messages = [
  {
    role: 'user',
    content: [
      { type: 'image', image },
      { type: 'text', text: question },
    ],
  },
];
const asked = { messages, maxRetries: 0 };

await tell({
  async whole() {
    const answer = await generateText({ model: compatible(model), system: 'Be brief.', ...asked });
    return [answer.text, answer.finishReason, answer.usage.outputTokens > 0];
  },
  async every_setting() {
    const answer = await generateText({
      model: compatible(model),
      ...asked,
      maxOutputTokens: 16,
      temperature: 0,
      topP: 1,
      presencePenalty: 0,
      frequencyPenalty: 0,
      stopSequences: ['\n'],
      seed: 1,
      providerOptions: { focusllava: { user: 'u', reasoningEffort: 'low' } },
    });
    return answer.text;
  },
  async streamed() {
    const answer = streamText({ model: compatible(model), ...asked });
    let text = '';
    for await (const piece of answer.textStream) text += piece;
    return [text, (await answer.usage).outputTokens > 0];
  },
  async object() {
    const answer = await generateObject({ model: compatible(model), schema, ...asked });
    return answer.object;
  },
  async object_streamed() {
    const answer = streamObject({ model: compatible(model), schema, ...asked });
    for await (const _ of answer.partialObjectStream);
    return await answer.object;
  },
  async one_of_the_choices() {
    const output = Output.choice({ options: ['40', '60', '80'] });
    return (await generateText({ model: compatible(model), output, ...asked })).output;
  },
  async completion() {
    const answer = await generateText({ model: compatible.completionModel(model), prompt: 'The number is', maxOutputTokens: 4, maxRetries: 0 });
    return answer.text;
  },
  async openais_chat() {
    const answer = await generateText({ model: openai.chat(model), ...asked });
    return [answer.text, answer.usage.outputTokens > 0];
  },
  async openais_chat_with_an_object() {
    const answer = await generateObject({ model: openai.chat(model), schema, ...asked });
    return answer.object;
  },
  async openais_completion() {
    const answer = await generateText({ model: openai.completion(model), prompt: 'The number is', maxOutputTokens: 4, maxRetries: 0 });
    return answer.text;
  },
  async openais_responses_are_refused() {
    const refused = await generateText({ model: openai(model), ...asked }).catch((error) => error);
    return [refused.statusCode, refused.message.includes('/v1/responses')];
  },
});
