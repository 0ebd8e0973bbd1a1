import { Kafka, Partitioners } from "kafkajs"; // npm install kafkajs; BOOTSTRAP=host:port node kafkajs-trigger.mjs USER ITEM
const [user = "17850", item = "85123A"] = process.argv.slice(2), id = crypto.randomUUID(), topic = "recommendations";
const kafka = new Kafka({ brokers: (process.env.BOOTSTRAP ?? "localhost:9092").split(","), logLevel: 0 });
const [admin, consumer, producer] = [kafka.admin(), kafka.consumer({ groupId: id }), kafka.producer({ createPartitioner: Partitioners.DefaultPartitioner })];
await Promise.all([admin.connect(), consumer.connect(), producer.connect(), consumer.subscribe({ topic })]);
const ends = await admin.fetchTopicOffsets(topic); // where answers will be read from: the trigger goes out later
consumer.on(consumer.events.GROUP_JOIN, () => ends.forEach(({ partition, high }) => consumer.seek({ topic, partition, offset: high })));
await consumer.run({ eachMessage: async ({ message }) => JSON.parse(message.value).request_id === id && (console.log(message.value.toString()), process.exit(0)) });
await producer.send({ topic: "triggers", messages: [{ key: user, value: JSON.stringify({ schema_version: 1, event_id: id, ts: Date.now(), request_id: id, user_id: user, item_id: item, k: 3 }) }] });
setTimeout(() => (console.error("no answer in 30 s"), process.exit(1)), 30_000);
