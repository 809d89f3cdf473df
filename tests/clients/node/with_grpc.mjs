// gRPC from the proto files alone: no generated code, and nothing of ours.
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { fileURLToPath } from 'node:url';
import { image, question, tell } from './cases.mjs';

const protos = fileURLToPath(new URL('../../../protos', import.meta.url));
const options = { includeDirs: [protos], keepCase: true, enums: String, longs: Number, oneofs: true };
const { focusllava } = grpc.loadPackageDefinition(loadSync('focusllava/v1/focus.proto', options));
const client = new focusllava.v1.FocusService(process.argv[2], grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set('application', 'gateway'); // the Serve application behind the port

const asked = { turns: [{ role: 'ROLE_USER', parts: [{ image }, { text: question }] }] };

async function events(request) {
  const found = [];
  for await (const event of client.Chat(request, metadata)) found.push(event);
  return found;
}

const text = (found) => found.map((event) => event.token?.text ?? '').join('');

await tell({
  async whole() {
    const found = await events(asked);
    return [text(found), found.at(-1).finished.reason, found.at(-1).finished.usage.visual_tokens_kept];
  },
  async focus_map() {
    const found = await events({ ...asked, return_map: true });
    const { maps } = found.find((event) => event.event === 'focus_maps').focus_maps;
    return [maps.length, maps[0].width, maps[0].boxes.length / 4, [...maps[0].kept].filter(Boolean).length];
  },
  async model_info() {
    const ask = (resolve, reject) =>
      client.GetModelInfo({}, metadata, (error, found) => (error ? reject(error) : resolve(found)));
    return (await new Promise(ask)).name;
  },
  async a_bad_request_is_refused_by_name() {
    try {
      await events({ ...asked, sampling: { temperature: 9 } });
    } catch (error) {
      return [error.code, error.details.split(':')[0]];
    }
  },
});
client.close();
