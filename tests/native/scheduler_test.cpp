// The KV ledger and the scheduler, without a model: a step "computes" by doing nothing.
#include "engine/scheduler.h"

#include <algorithm>
#include <memory>
#include <random>

#include "check.h"
#include "engine/kv_pool.h"

namespace {

using tw::kBlockTokens;
using tw::KvPool;
using tw::Scheduler;
using tw::Sequence;
using tw::StepPlan;

// Drives a scheduler as the engine does, with a made-up next token for each sequence that reached its end.
struct Driver {
  Driver(int32_t blocks, int32_t rows, int32_t running) : pool(blocks, true), scheduler({rows, running}, &pool) {}

  Sequence* add(int32_t prompt, int32_t max_tokens, int32_t first_token = 0, int32_t priority = 0) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = next_id++;
    sequence->priority = priority;
    for (int32_t i = 0; i < prompt; ++i) sequence->tokens.push_back(first_token + i);
    sequence->num_prompt_tokens = prompt;
    sequence->max_total_tokens = prompt + max_tokens;
    scheduler.add(sequence.get());
    all.push_back(std::move(sequence));
    return all.back().get();
  }

  // One step; returns the number of rows.
  int32_t step() {
    scheduler.plan(&plan, &scheduled, &admitted);
    const int32_t rows = plan.num_rows();
    for (size_t i = 0; i < scheduled.size(); ++i) {
      CHECK(scheduled[i]->num_computed == plan.slices[i].position);
      CHECK(static_cast<int32_t>(scheduled[i]->block_table.size()) * kBlockTokens >=
            plan.slices[i].position + plan.slices[i].num_rows);
    }
    scheduler.commit(plan, scheduled);
    const std::vector<Sequence*> done = scheduled;
    for (Sequence* sequence : done) {
      if (sequence->num_computed != sequence->num_tokens()) continue;
      sequence->tokens.push_back(1000000 + static_cast<int32_t>(sequence->id) * 1000 + sequence->num_tokens());
      if (sequence->num_tokens() == sequence->max_total_tokens) {
        scheduler.remove(sequence);
        finished.push_back(sequence->id);
      }
    }
    CHECK_EQ(scheduler.audit(), std::string());
    return rows;
  }

  KvPool pool;
  Scheduler scheduler;
  StepPlan plan;
  std::vector<Sequence*> scheduled, admitted;
  std::vector<std::unique_ptr<Sequence>> all;
  std::vector<uint64_t> finished;
  uint64_t next_id = 1;
};

}  // namespace

TEST(a_prompt_is_cut_to_the_row_budget) {
  Driver driver(64, 32, 8);
  driver.add(80, 4);
  CHECK_EQ(driver.step(), 32);
  CHECK_EQ(driver.step(), 32);
  CHECK_EQ(driver.step(), 16);
  CHECK_EQ(driver.step(), 1);
}

TEST(a_prompt_that_holds_up_no_stream_is_cut_larger) {
  KvPool pool(64, false);
  Scheduler scheduler({32, 8, 64}, &pool);
  Sequence prompt, stream;
  prompt.id = 1;
  prompt.tokens.assign(300, 7);
  prompt.num_prompt_tokens = 300;
  prompt.max_total_tokens = 310;
  stream.id = 2;
  stream.priority = 1;
  stream.tokens.assign(20, 9);
  stream.num_prompt_tokens = 20;
  stream.max_total_tokens = 40;
  StepPlan plan;
  std::vector<Sequence*> scheduled, admitted;
  const auto step = [&] {
    scheduler.plan(&plan, &scheduled, &admitted);
    scheduler.commit(plan, scheduled);
    return plan.num_rows();
  };
  scheduler.add(&prompt);
  CHECK_EQ(step(), 64);
  scheduler.add(&stream);
  CHECK_EQ(step(), 64);  // both prompts
  stream.tokens.push_back(11);
  CHECK_EQ(step(), 32);
  scheduler.remove(&stream);
  CHECK_EQ(step(), 64);
  CHECK_EQ(scheduler.audit(), std::string());
}

TEST(decoding_goes_on_beside_a_long_prompt) {
  Driver driver(256, 32, 8);
  Sequence* decoding = driver.add(4, 50);
  driver.step();
  driver.add(500, 4, 5000);
  for (int i = 0; i < 8; ++i) {
    const int32_t before = decoding->num_tokens();
    CHECK_EQ(driver.step(), 32);
    CHECK_EQ(decoding->num_tokens(), before + 1);
  }
}

TEST(jobs_are_admitted_in_order_and_by_priority) {
  Driver driver(8, 256, 1);
  driver.add(16, 1, 0);
  driver.add(16, 1, 100);
  driver.add(16, 1, 200, 5);
  while (driver.finished.size() < 3) driver.step();
  CHECK_EQ(driver.finished[0], uint64_t{3});
  CHECK_EQ(driver.finished[1], uint64_t{1});
  CHECK_EQ(driver.finished[2], uint64_t{2});
}

TEST(equal_classes_are_first_come_first_served) {
  Driver driver(64, 256, 1);
  for (int i = 0; i < 6; ++i) driver.add(16, 1, 100 * i, i % 2 == 0 ? -1 : 2);
  while (driver.finished.size() < 6) driver.step();
  const std::vector<uint64_t> expected = {2, 4, 6, 1, 3, 5};
  CHECK(driver.finished == expected);
}

TEST(a_job_is_overtaken_only_so_often) {
  Driver driver(64, 256, 1);
  driver.add(16, 2, 0);
  driver.step();  // the one place is taken
  const uint64_t low = driver.add(16, 1, 100, -2)->id;
  for (int i = 0; i < 2 * tw::kMaxOvertaken; ++i) driver.add(16, 1, 200 + 20 * i, 2);
  while (driver.finished.size() < 2 + 2 * tw::kMaxOvertaken) driver.step();
  const auto place = std::find(driver.finished.begin(), driver.finished.end(), low) - driver.finished.begin();
  CHECK_EQ(place, std::ptrdiff_t{1 + tw::kMaxOvertaken});
}

TEST(a_constant_stream_of_a_higher_class_starves_nobody) {
  Driver driver(64, 256, 1);
  const uint64_t low = driver.add(16, 1, 0, -2)->id;
  int steps = 0;
  while (std::find(driver.finished.begin(), driver.finished.end(), low) == driver.finished.end() && ++steps < 1000) {
    driver.add(16, 1, 100 + steps * 16, 2);
    driver.add(16, 1, 50100 + steps * 16, 2);
    driver.step();
  }
  CHECK(steps < 100);
}

TEST(a_higher_class_reads_its_prompt_first) {
  Driver driver(256, 32, 4);
  Sequence* low = driver.add(400, 1, 0, 0);
  driver.step();
  Sequence* equal = driver.add(40, 1, 5000, 0);
  Sequence* high = driver.add(40, 1, 9000, 1);
  driver.step();
  CHECK_EQ(low->num_computed, 32);
  CHECK_EQ(high->num_computed, 32);
  driver.step();  // the last 8 of the higher class, then the lower one goes on, and its equal waits for it
  CHECK_EQ(high->num_tokens(), 41);
  CHECK_EQ(low->num_computed, 56);
  CHECK_EQ(equal->num_computed, 0);
}

TEST(the_lowest_class_is_preempted_before_the_youngest) {
  Driver driver(6, 64, 4);
  const uint64_t low = driver.add(30, 40, 0, -1)->id;
  driver.step();
  const uint64_t high = driver.add(30, 40, 1000, 1)->id;
  while (driver.finished.empty()) driver.step();
  CHECK(driver.scheduler.num_preemptions() > 0);
  CHECK_EQ(driver.finished[0], high);
  while (driver.finished.size() < 2) driver.step();
  CHECK_EQ(driver.finished[1], low);
}

TEST(the_youngest_is_preempted_and_the_oldest_never_stops) {
  Driver driver(6, 64, 4);
  Sequence* oldest = driver.add(30, 60, 0);
  driver.add(30, 60, 1000);
  driver.add(20, 60, 2000);
  int steps = 0;
  int32_t length = 0;
  while (driver.finished.empty() && ++steps < 1000) {
    driver.step();
    if (steps > 2 && driver.finished.empty()) CHECK(oldest->num_tokens() > length);
    length = oldest->num_tokens();
  }
  CHECK_EQ(driver.finished[0], uint64_t{1});
  CHECK(driver.scheduler.num_preemptions() > 0);
  while (driver.finished.size() < 3 && ++steps < 1000) driver.step();
  CHECK_EQ(driver.finished.size(), size_t{3});
}

TEST(what_can_never_fit_is_known_at_once) {
  Driver driver(4, 64, 4);
  CHECK(driver.scheduler.can_ever_fit(4 * kBlockTokens));
  CHECK(!driver.scheduler.can_ever_fit(4 * kBlockTokens + 1));
}

TEST(a_shared_prefix_is_found_and_the_last_token_is_computed_anew) {
  Driver driver(64, 256, 8);
  driver.add(64, 2, 0);
  driver.step();
  driver.step();
  Sequence* second = driver.add(64, 2, 0);
  driver.step();
  CHECK_EQ(second->num_cached_tokens, 3 * kBlockTokens);
}

TEST(generated_blocks_are_found_once_there_was_time_or_their_sequence_ended) {
  for (const bool had_time : {true, false}) {
    Driver driver(64, 256, 8);
    Sequence* first = driver.add(kBlockTokens, had_time ? 40 : kBlockTokens + 2, 0);
    while (first->num_tokens() < 2 * kBlockTokens + 2) driver.step();
    CHECK_EQ(driver.finished.empty(), had_time);
    const auto found = [&] {
      const std::vector<int32_t> blocks = driver.pool.acquire_prefix("", first->tokens.data(), 2 * kBlockTokens);
      for (const int32_t block : blocks) driver.pool.release(block);
      return blocks.size();
    };
    if (had_time) {
      CHECK_EQ(found(), size_t{1});
      driver.scheduler.publish_generated();
    }
    CHECK_EQ(found(), size_t{2});
    driver.scheduler.publish_generated();
    CHECK_EQ(driver.scheduler.audit(), std::string());
  }
}

TEST(a_token_that_is_still_drawn_is_named_as_its_draw) {
  Driver driver(64, 256, 8);
  Sequence* first = driver.add(20, 10, 0);
  Sequence* second = driver.add(kBlockTokens, 10, 500);
  driver.step();
  // As the engine does: asked for, and not yet known.
  const auto ask = [&] {
    driver.scheduler.plan(&driver.plan, &driver.scheduled, &driver.admitted);
    driver.scheduler.commit(driver.plan, driver.scheduled);
    for (size_t i = 0; i < driver.scheduled.size(); ++i) {
      driver.scheduled[i]->pending_draw = static_cast<int32_t>(i);
    }
  };
  ask();
  CHECK(driver.plan.token_ids == (std::vector<int32_t>{first->tokens.back(), second->tokens.back()}));
  ask();
  CHECK(driver.plan.token_ids == (std::vector<int32_t>{-1, -2}));
  CHECK_EQ(driver.plan.slices[0].position, 21);
  CHECK(driver.plan.logit_rows == (std::vector<int32_t>{0, 1}));
  // Its blocks are offered as far as its tokens are known: the second one's next would be full.
  second->num_computed = 2 * kBlockTokens;
  driver.scheduler.publish_generated();
  CHECK_EQ(second->num_published, 1);
}

TEST(a_draw_that_may_be_the_last_is_waited_for) {
  Driver driver(64, 256, 8);
  Sequence* sequence = driver.add(20, 2, 0);
  driver.step();
  CHECK_EQ(driver.step(), 1);  // drawn, the last one
  CHECK_EQ(driver.finished.size(), size_t{1});
  sequence = driver.add(20, 2, 0);
  driver.step();
  driver.scheduler.plan(&driver.plan, &driver.scheduled, &driver.admitted);
  driver.scheduler.commit(driver.plan, driver.scheduled);
  sequence->pending_draw = 0;
  CHECK_EQ(sequence->length(), sequence->max_total_tokens);
  driver.scheduler.plan(&driver.plan, &driver.scheduled, &driver.admitted);
  CHECK_EQ(driver.plan.num_rows(), 0);
}

TEST(a_preempted_sequence_waits_for_what_was_drawn_for_it) {
  Driver driver(4, 64, 4);
  Sequence* oldest = driver.add(30, 30, 0);
  Sequence* other = driver.add(30, 30, 1000);
  driver.step();
  other->pending_draw = 1;
  while (driver.scheduler.num_preemptions() == 0) driver.step();
  CHECK(other->block_table.empty());
  driver.scheduler.remove(oldest);
  CHECK(!driver.scheduler.has_work());
  CHECK_EQ(driver.step(), 0);
  other->pending_draw = -1;
  CHECK(driver.scheduler.has_work());
  CHECK(driver.step() > 0);
}

TEST(the_beginning_of_a_cached_prefix_outlives_its_end) {
  Driver driver(8, 256, 8);
  driver.add(64, 1, 0);
  driver.step();
  driver.add(6 * kBlockTokens - 1, 1, 5000);
  driver.step();
  Sequence* again = driver.add(64, 1, 0);
  driver.step();
  CHECK_EQ(again->num_cached_tokens, 2 * kBlockTokens);
}

TEST(a_preempted_sequence_that_is_paused_computes_nothing_and_holds_up_nobody) {
  Driver driver(4, 64, 4);
  Sequence* oldest = driver.add(30, 30, 0);
  Sequence* paused = driver.add(30, 30, 1000);
  while (driver.scheduler.num_preemptions() == 0) driver.step();
  paused->paused = true;
  const int32_t computed = paused->num_tokens();
  Sequence* later = driver.add(8, 2, 2000);
  for (int i = 0; i < 100; ++i) driver.step();
  CHECK_EQ(oldest->num_tokens(), 60);
  CHECK_EQ(later->num_tokens(), 10);
  CHECK_EQ(paused->num_tokens(), computed);
  CHECK(paused->block_table.empty());
  CHECK(!driver.scheduler.has_work());
  paused->paused = false;
  CHECK(driver.scheduler.has_work());
  for (int i = 0; i < 40; ++i) driver.step();
  CHECK_EQ(paused->num_tokens(), 60);
}

TEST(another_salt_shares_nothing) {
  Driver driver(64, 256, 8);
  driver.add(64, 2, 0);
  driver.step();
  driver.step();
  Sequence* second = driver.add(64, 2, 0);
  second->cache_salt = "tenant";
  driver.step();
  CHECK_EQ(second->num_cached_tokens, 0);
}

TEST(equal_hashes_do_not_share_without_equal_tokens) {
  KvPool pool(4, true);
  std::vector<int32_t> tokens(kBlockTokens, 7);
  const int32_t block = pool.allocate();
  const KvPool::Hash root = KvPool::root_hash("");
  pool.publish(block, "", root, tokens.data());
  CHECK_EQ(pool.acquire_prefix("", tokens.data(), kBlockTokens).size(), size_t{1});
  tokens[3] = 8;
  CHECK_EQ(pool.acquire_prefix("", tokens.data(), kBlockTokens).size(), size_t{0});
}

TEST(cached_blocks_are_given_up_least_recently_used_first) {
  KvPool pool(3, true);
  std::vector<std::vector<int32_t>> prompts;
  for (int32_t i = 0; i < 3; ++i) {
    prompts.emplace_back(kBlockTokens, i);
    const int32_t block = pool.allocate();
    pool.publish(block, "", KvPool::root_hash(""), prompts.back().data());
    pool.release(block);
  }
  CHECK_EQ(pool.num_cached(), 3);
  for (const int32_t block : pool.acquire_prefix("", prompts[0].data(), kBlockTokens)) pool.release(block);
  pool.allocate();
  CHECK_EQ(pool.acquire_prefix("", prompts[1].data(), kBlockTokens).size(), size_t{0});
  CHECK_EQ(pool.acquire_prefix("", prompts[0].data(), kBlockTokens).size(), size_t{1});
}

TEST(a_paused_sequence_keeps_its_blocks_and_computes_nothing) {
  Driver driver(64, 64, 8);
  Sequence* slow = driver.add(20, 20);
  driver.step();
  slow->paused = true;
  CHECK_EQ(driver.step(), 0);
  CHECK(!slow->block_table.empty());
  CHECK(!driver.scheduler.has_work());
  slow->paused = false;
  CHECK_EQ(driver.step(), 1);
}

TEST(random_loads_with_cancels_balance_the_ledger) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](uint32_t n) { return static_cast<int32_t>(random() % n); };
    Driver driver(6 + below(40), 16 + below(64), 1 + below(12));
    for (int step = 0; step < 400; ++step) {
      if (below(3) == 0) {
        const int32_t prompt = 1 + below(60);
        const int32_t output = 1 + below(30);
        if (driver.scheduler.can_ever_fit(prompt + output)) driver.add(prompt, output, 1000 * below(3));
      }
      driver.step();
      if (below(5) == 0 && !driver.all.empty()) {
        Sequence* victim = driver.all[static_cast<size_t>(below(static_cast<uint32_t>(driver.all.size())))].get();
        const auto& done = driver.finished;
        if (std::find(done.begin(), done.end(), victim->id) == done.end()) {
          driver.scheduler.remove(victim);
          driver.finished.push_back(victim->id);
          CHECK_EQ(driver.scheduler.audit(), std::string());
        }
      }
    }
    for (int step = 0; step < 20000 && driver.finished.size() < driver.all.size(); ++step) driver.step();
    CHECK_EQ(driver.finished.size(), driver.all.size());
    CHECK_EQ(driver.pool.num_used(), 0);
    driver.pool.clear_cache();
    CHECK_EQ(driver.pool.num_free(), driver.pool.num_total());
  }
}

TEST(what_the_cache_holds_is_told_by_salt_and_given_up_once) {
  KvPool pool(4, true);
  const std::vector<int32_t> tokens(static_cast<size_t>(kBlockTokens), 7);
  std::vector<int32_t> held;
  for (const char* salt : {"", "tenant"}) {
    held.push_back(pool.allocate());
    pool.publish(held.back(), salt, KvPool::root_hash(salt), tokens.data());
  }
  CHECK_EQ(pool.cache_contents().at("").shared_blocks, 1);
  CHECK_EQ(pool.cache_contents().at("tenant").shared_blocks, 1);
  pool.release(held[0]);
  CHECK_EQ(pool.cache_contents().at("").cached_blocks, 1);
  CHECK_EQ(pool.cache_contents().at("").shared_blocks, 0);
  // Two free blocks, then the cached one goes.
  for (int32_t i = 0; i < 3; ++i) pool.allocate();
  CHECK_EQ(pool.num_evictions(), int64_t{1});
  CHECK_EQ(pool.cache_contents().count(""), size_t{0});
  pool.release(held[1]);
  CHECK_EQ(pool.clear_cache(), 1);
  CHECK(pool.cache_contents().empty());
  CHECK_EQ(pool.num_evictions(), int64_t{1});
}
