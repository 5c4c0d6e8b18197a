// A job between its two sides: which tokens share an event, and the digest that proves them.
#include "engine/job.h"

#include "check.h"

namespace {

using tw::Job;
using tw::JobSpec;

const std::vector<std::string> kWords(10, "w");

bool add(Job* job, int32_t id, const std::string& text) {
  tw::SampleResult result;
  result.id = id;
  return job->add_token(result, text);
}

// The digest of ids 1, 2, …, `count`, as an event's bytes hold it.
std::string digest_of(uint8_t count) {
  tw::Sha256 hash;
  for (uint8_t id = 1; id <= count; ++id) {
    const uint8_t little_endian[4] = {id, 0, 0, 0};
    hash.update(little_endian, sizeof little_endian);
  }
  return hash.hex().substr(0, 16);
}

bool holds(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

Job job_with(bool separate_events) {
  JobSpec spec;
  spec.separate_events = separate_events;
  return Job(1, spec);
}

void add_five(Job* job) {
  add(job, 1, "one");
  add(job, 2, "");  // its text waits
  add(job, 3, "two-three");
  add(job, 4, "four");
  add(job, 5, "");
}

}  // namespace

TEST(what_waits_travels_in_one_event) {
  Job job = job_with(false);
  add_five(&job);
  CHECK_EQ(job.num_undelivered(), 4);
  const tw::Taken taken = job.take(kWords);
  CHECK_EQ(taken.messages.size(), size_t{1});
  CHECK(holds(taken.messages[0], "onetwo-threefour"));
  CHECK(holds(taken.messages[0], digest_of(4)));
  CHECK_EQ(job.num_undelivered(), 0);
}

TEST(separate_events_stay_as_they_were_released) {
  Job job = job_with(true);
  add_five(&job);
  CHECK_EQ(job.num_undelivered(), 4);
  tw::Taken taken = job.take(kWords);
  CHECK_EQ(taken.messages.size(), size_t{3});
  const std::string texts[] = {"one", "two-three", "four"};
  const uint8_t ends[] = {1, 3, 4};
  for (size_t i = 0; i < 3; ++i) {
    CHECK(holds(taken.messages[i], texts[i]));
    CHECK(holds(taken.messages[i], digest_of(ends[i])));
  }
  tw::Outcome outcome;
  outcome.stop_reason = tw::StopReason::kMaxTokens;
  job.finish(outcome, "five");
  taken = job.take(kWords);
  CHECK_EQ(taken.messages.size(), size_t{3});  // token, metrics, end
  CHECK(holds(taken.messages[0], "five"));
  CHECK(holds(taken.messages[0], digest_of(5)));
  CHECK(holds(taken.messages[2], digest_of(5)));
  CHECK_EQ(taken.outcome->digest.substr(0, 16), digest_of(5));
}

TEST(the_digest_of_a_cancelled_job_is_of_what_was_released) {
  Job job = job_with(false);
  add_five(&job);
  job.cancel();
  job.finish({}, "");
  const tw::Taken taken = job.take(kWords);
  CHECK_EQ(taken.outcome->digest.substr(0, 16), digest_of(4));
}

TEST(an_error_leaves_out_what_is_held_back) {
  Job job = job_with(false);
  add_five(&job);
  tw::Outcome outcome;
  outcome.error_code = "DEADLINE_EXCEEDED";
  job.finish(outcome, "\xEF\xBF\xBD");
  const tw::Taken taken = job.take(kWords);
  CHECK(holds(taken.messages[0], "onetwo-threefour"));
  for (const std::string& message : taken.messages) CHECK(!holds(message, "\xEF\xBF\xBD"));
  CHECK_EQ(taken.outcome->digest.substr(0, 16), digest_of(4));
}

// Python's hashlib gave these.
TEST(sha256_pads_every_length) {
  const std::pair<size_t, std::string> cases[] = {
      {0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {1, "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"},
      {54, "a3f01b6939256127582ac8ae9fb47a382a244680806a3f613a118851c1ca1d47"},
      {55, "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318"},
      {56, "b35439a4ac6f0948b6d6f9e3c6af0f5f590ce20f1bde7090ef7970686ec6738a"},
      {57, "f13b2d724659eb3bf47f2dd6af1accc87b81f09f59f2b75e5c0bed6589dfe8c6"},
      {63, "7d3e74a05d7db15bce4ad9ec0658ea98e3f06eeecf16b4c6fff2da457ddc2f34"},
      {64, "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb"},
      {65, "635361c48bb9eab14198e76ea8ab7f1a41685d6ad62aa9146d301d4f17eb0ae0"},
      {119, "31eba51c313a5c08226adf18d4a359cfdfd8d2e816b13f4af952f7ea6584dcfb"},
      {120, "2f3d335432c70b580af0e8e1b3674a7c020d683aa5f73aaaedfdc55af904c21c"},
      {128, "6836cf13bac400e9105071cd6af47084dfacad4e5e302c94bfed24e013afb73e"},
  };
  for (const auto& [length, expected] : cases) {
    tw::Sha256 hash;
    hash.update(std::string(length, 'a').data(), length);
    CHECK_EQ(hash.hex(), expected);
  }
}
