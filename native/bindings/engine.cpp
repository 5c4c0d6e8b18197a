#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/module.h"
#include "engine/engine.h"
#include "engine/llguidance.h"
#include "engine/progress_relay.h"
#include "engine/runner.h"

namespace py = pybind11;

namespace tw::bindings {
namespace {

const char* name_of(StopReason reason) {
  switch (reason) {
    case StopReason::kEos: return "eos";
    case StopReason::kMaxTokens: return "max_tokens";
    case StopReason::kStopSequence: return "stop_sequence";
    case StopReason::kNone: break;
  }
  return "";
}

// A job and the engine it lives in: the engine outlives its jobs' readers.
struct JobHandle {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Job> job;
};

py::tuple take(const JobHandle& self) {
  Taken taken;
  {
    const py::gil_scoped_release release;
    taken = self.job->take(self.engine->vocabulary());
  }
  py::list messages;
  for (const std::string& message : taken.messages) messages.append(py::bytes(message));
  if (!taken.outcome) return py::make_tuple(messages, py::none());
  return py::make_tuple(messages, py::cast(std::move(*taken.outcome)));
}

std::shared_ptr<Engine> load_engine(const gguf::File& file, const std::function<Vocabulary()>& read_vocabulary,
                                    const EngineOptions& options, const py::object& on_progress) {
  std::function<void(int)> progress = [](int) {};
  if (!on_progress.is_none()) {
    progress = [&on_progress](int percent) {
      const py::gil_scoped_acquire acquire;
      on_progress(percent);
    };
  }
  const py::gil_scoped_release release;
  ProgressRelay relay(progress);
  auto engine =
      std::make_shared<Engine>(file, read_vocabulary, options, [&relay](int percent) { relay.post(percent); });
  relay.finish();
  return engine;
}

std::shared_ptr<Engine> make_engine(const gguf::File& file, std::vector<std::string> vocabulary,
                                    std::vector<int32_t> stop_token_ids, const EngineOptions& options,
                                    const py::object& on_progress) {
  const Vocabulary known{std::move(vocabulary), std::move(stop_token_ids)};
  return load_engine(file, [&known] { return known; }, options, on_progress);
}

std::shared_ptr<Engine> load_beside(const gguf::File& file, const py::function& read_vocabulary,
                                    const EngineOptions& options, const py::object& on_progress) {
  const auto read = [&read_vocabulary] {
    const py::gil_scoped_acquire acquire;
    auto [tokens, stop_token_ids] = read_vocabulary().cast<std::pair<std::vector<std::string>, std::vector<int32_t>>>();
    return Vocabulary{std::move(tokens), std::move(stop_token_ids)};
  };
  return load_engine(file, read, options, on_progress);
}

// A compiled grammar; opaque.
struct GrammarHandle {
  std::shared_ptr<const Grammar> grammar;
};

JobHandle submit(const std::shared_ptr<Engine>& self, std::string job_id, std::string model,
                 std::vector<int32_t> prompt_ids, int32_t max_tokens, float temperature, float top_p, int32_t top_k,
                 float min_p, float repetition_penalty, float frequency_penalty, float presence_penalty,
                 const std::map<int32_t, float>& logit_bias, int32_t logprobs, std::vector<std::string> stop,
                 uint64_t seed, int64_t timeout_ms, std::string cache_salt, bool separate_events, int32_t priority,
                 const std::optional<GrammarHandle>& grammar) {
  JobSpec spec;
  spec.job_id = std::move(job_id);
  spec.model = std::move(model);
  spec.prompt_ids = std::move(prompt_ids);
  spec.max_tokens = max_tokens;
  spec.sampling.temperature = temperature;
  spec.sampling.top_p = top_p;
  spec.sampling.top_k = top_k;
  spec.sampling.min_p = min_p;
  spec.sampling.repetition_penalty = repetition_penalty;
  spec.sampling.frequency_penalty = frequency_penalty;
  spec.sampling.presence_penalty = presence_penalty;
  spec.sampling.logit_bias.assign(logit_bias.begin(), logit_bias.end());
  spec.sampling.num_logprobs = logprobs;
  spec.sampling.seed = seed;
  spec.stops = std::move(stop);
  spec.timeout_ms = timeout_ms;
  spec.cache_salt = std::move(cache_salt);
  spec.separate_events = separate_events;
  spec.priority = priority;
  if (grammar) spec.grammar = grammar->grammar;
  const py::gil_scoped_release release;
  return {self, self->submit(std::move(spec))};
}

py::dict cache_contents(Engine& self) {
  CacheContents contents;
  {
    const py::gil_scoped_release release;
    contents = self.cache_contents();
  }
  py::dict result;
  for (const auto& [salt, share] : contents) {
    result[py::bytes(salt)] = py::make_tuple(share.cached_blocks, share.shared_blocks);
  }
  return result;
}

void bind_reports(py::module_& module) {
  py::class_<ModelInfo>(module, "ModelInfo")
      .def_readonly("architecture", &ModelInfo::architecture)
      .def_readonly("name", &ModelInfo::name)
      .def_readonly("quant_kind", &ModelInfo::quant_kind)
      .def_readonly("context_length", &ModelInfo::context_length)
      .def_readonly("vocab_size", &ModelInfo::vocab_size)
      .def_readonly("num_layers", &ModelInfo::num_layers)
      .def_readonly("weight_bytes", &ModelInfo::weight_bytes)
      .def_readonly("kv_bytes_per_token", &ModelInfo::kv_bytes_per_token);

  py::class_<Histogram>(module, "Histogram")
      .def_readonly("bounds", &Histogram::bounds)
      .def_readonly("counts", &Histogram::counts)
      .def_readonly("sum", &Histogram::sum);

  py::class_<EngineStats>(module, "EngineStats")
      .def_readonly("active_jobs", &EngineStats::active_jobs)
      .def_readonly("queued_jobs", &EngineStats::queued_jobs)
      .def_readonly("total_blocks", &EngineStats::total_blocks)
      .def_readonly("free_blocks", &EngineStats::free_blocks)
      .def_readonly("used_blocks", &EngineStats::used_blocks)
      .def_readonly("cached_blocks", &EngineStats::cached_blocks)
      .def_property_readonly("block_tokens", [](const EngineStats&) { return kBlockTokens; })
      .def_readonly("num_steps", &EngineStats::num_steps)
      .def_readonly("num_prompt_tokens", &EngineStats::num_prompt_tokens)
      .def_readonly("num_cached_tokens", &EngineStats::num_cached_tokens)
      .def_readonly("num_generated_tokens", &EngineStats::num_generated_tokens)
      .def_readonly("num_preemptions", &EngineStats::num_preemptions)
      .def_readonly("num_cache_hits", &EngineStats::num_cache_hits)
      .def_readonly("num_cache_misses", &EngineStats::num_cache_misses)
      .def_readonly("num_evictions", &EngineStats::num_evictions)
      .def_readonly("last_batch_size", &EngineStats::last_batch_size)
      .def_readonly("inter_token_s", &EngineStats::inter_token_s)
      .def_readonly("batch_size", &EngineStats::batch_size)
      .def_readonly("cancel_s", &EngineStats::cancel_s)
      .def_readonly("tokens_per_second", &EngineStats::tokens_per_second)
      .def_readonly("heartbeat_age_ms", &EngineStats::heartbeat_age_ms)
      .def_readonly("num_out_of_memory", &EngineStats::num_out_of_memory)
      .def_property_readonly("weight_bytes", [](const EngineStats& stats) { return stats.memory.weight_bytes; })
      .def_property_readonly("kv_bytes", [](const EngineStats& stats) { return stats.memory.kv_bytes; })
      .def_property_readonly("workspace_bytes", [](const EngineStats& stats) { return stats.memory.workspace_bytes; })
      .def_readonly("failure", &EngineStats::failure)
      .def_readonly("failure_code", &EngineStats::failure_code);

  py::class_<DeviceInfo>(module, "DeviceInfo")
      .def_readonly("id", &DeviceInfo::id)
      .def_readonly("name", &DeviceInfo::name)
      .def_readonly("sm", &DeviceInfo::sm)
      .def_readonly("runtime_version", &DeviceInfo::runtime_version);

  py::class_<Outcome>(module, "Outcome")
      .def_readonly("error_code", &Outcome::error_code)
      .def_readonly("error_message", &Outcome::error_message)
      .def_property_readonly("stop_reason", [](const Outcome& outcome) { return name_of(outcome.stop_reason); })
      .def_readonly("stop_sequence", &Outcome::stop_sequence)
      .def_readonly("digest", &Outcome::digest)
      .def_property_readonly("tokens_in", [](const Outcome& outcome) { return outcome.metrics.tokens_in; })
      .def_property_readonly("tokens_out", [](const Outcome& outcome) { return outcome.metrics.tokens_out; })
      .def_property_readonly("cached_tokens", [](const Outcome& outcome) { return outcome.metrics.cached_tokens; })
      .def_property_readonly("queue_ms", [](const Outcome& outcome) { return outcome.metrics.queue_ms; })
      .def_property_readonly("prefill_ms", [](const Outcome& outcome) { return outcome.metrics.prefill_ms; })
      .def_property_readonly("first_token_ms", [](const Outcome& outcome) { return outcome.metrics.first_token_ms; })
      .def_property_readonly("decode_ms", [](const Outcome& outcome) { return outcome.metrics.decode_ms; })
      .def_readonly("cache_lookup_ms", &Outcome::cache_lookup_ms);
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<EngineOptions>(module, "EngineOptions")
      .def(py::init<>())
      .def_readwrite("device", &EngineOptions::device)
      .def_readwrite("num_threads", &EngineOptions::num_threads)
      .def_readwrite("compute_nice", &EngineOptions::compute_nice)
      .def_readwrite("kv_cache_bytes", &EngineOptions::kv_cache_bytes)
      .def_readwrite("max_context_tokens", &EngineOptions::max_context_tokens)
      .def_readwrite("max_batch_tokens", &EngineOptions::max_batch_tokens)
      .def_readwrite("max_running_jobs", &EngineOptions::max_running_jobs)
      .def_readwrite("run_ahead", &EngineOptions::run_ahead)
      .def_readwrite("max_queued_jobs", &EngineOptions::max_queued_jobs)
      .def_readwrite("max_queued_tokens", &EngineOptions::max_queued_tokens)
      .def_readwrite("batch_window_ms", &EngineOptions::batch_window_ms)
      .def_readwrite("prefix_cache", &EngineOptions::prefix_cache)
      .def_readwrite("max_undelivered_tokens", &EngineOptions::max_undelivered_tokens)
      .def_readwrite("slow_reader_timeout_ms", &EngineOptions::slow_reader_timeout_ms)
      .def_readwrite("faults", &EngineOptions::faults);
  bind_reports(module);

  py::class_<JobHandle>(module, "Job")
      .def_property_readonly("handle", [](const JobHandle& self) { return self.job->handle(); })
      .def("take", &take)
      .def("cancel",
           [](const JobHandle& self) {
             const py::gil_scoped_release release;
             const uint32_t tokens = self.job->cancel();
             self.engine->wake();
             return tokens;
           })
      .def_property_readonly("num_tokens_out", [](const JobHandle& self) { return self.job->num_tokens_out(); });

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<GrammarHandle>(module, "Grammar");
  py::class_<GrammarCompiler, std::shared_ptr<GrammarCompiler>>(module, "GrammarCompiler")
      .def(py::init<const std::string&, const std::vector<std::string>&, const std::vector<int32_t>&>(),
           py::arg("library"), py::arg("vocabulary"), py::arg("stop_token_ids"), unlocked)
      .def(
          "compile",
          [](const GrammarCompiler& self, const std::string& kind, const std::string& text) {
            return GrammarHandle{self.compile(kind, text)};
          },
          py::arg("kind"), py::arg("text"), unlocked)
      .def_property_readonly("version", &GrammarCompiler::version);
  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine")
      .def(py::init(&make_engine), py::arg("file"), py::arg("vocabulary"), py::arg("stop_token_ids"),
           py::arg("options"), py::arg("on_progress") = py::none())
      .def_static("load_beside", &load_beside, py::arg("file"), py::arg("read_vocabulary"), py::arg("options"),
                  py::arg("on_progress") = py::none())
      .def_property_readonly("model_info", &Engine::model_info)
      .def_property_readonly("device_info", &Engine::device_info)
      .def_property_readonly("options", &Engine::options)
      .def_property_readonly("event_fd", &Engine::event_fd)
      .def_property_readonly("supports_grammars", &Engine::supports_grammars)
      .def("submit", &submit, py::kw_only(), py::arg("job_id"), py::arg("model"), py::arg("prompt_ids"),
           py::arg("max_tokens"), py::arg("temperature"), py::arg("top_p"), py::arg("top_k"), py::arg("min_p"),
           py::arg("repetition_penalty"), py::arg("frequency_penalty"), py::arg("presence_penalty"),
           py::arg("logit_bias"), py::arg("logprobs"), py::arg("stop"), py::arg("seed"), py::arg("timeout_ms"),
           py::arg("cache_salt"), py::arg("separate_events") = false, py::arg("priority") = 0,
           py::arg("grammar") = py::none())
      .def("take_ready", &Engine::take_ready, unlocked)
      .def(
          "fail_all",
          [](Engine& self, const std::string& code, const std::string& message) {
            return self.fail_all(error_code_from_string(code), message);
          },
          py::arg("code"), py::arg("message"), unlocked)
      .def("stats", &Engine::stats, unlocked)
      .def("audit", &Engine::audit, unlocked)
      .def("check_residency", &Engine::check_residency, unlocked)
      .def("cache_contents", &cache_contents)
      .def("clear_cache", &Engine::clear_cache, unlocked)
      .def_property("batch_window_ms", &Engine::batch_window, &Engine::set_batch_window)
      .def("inject_stall", &Engine::inject_stall, unlocked, py::arg("milliseconds"))
      .def("stop", &Engine::stop, unlocked);
}

void bind_runner(py::module_& module) {
  const auto to_bytes = [](const std::vector<float>& logits) {
    return py::bytes(reinterpret_cast<const char*>(logits.data()), logits.size() * sizeof(float));
  };
  py::class_<Runner>(module, "Runner")
      .def(py::init<const gguf::File&, const EngineOptions&>(), py::arg("file"), py::arg("options"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("model_info", &Runner::model_info)
      .def(
          "forward",
          [to_bytes](Runner& self, int32_t sequence, const std::vector<int32_t>& ids, bool all_logits) {
            std::vector<float> logits;
            {
              const py::gil_scoped_release release;
              logits = self.forward(sequence, ids, all_logits);
            }
            return to_bytes(logits);
          },
          py::arg("sequence"), py::arg("token_ids"), py::arg("all_logits") = false)
      .def(
          "forward_batch",
          [to_bytes](Runner& self, const std::vector<int32_t>& sequences, const std::vector<int32_t>& ids) {
            std::vector<float> logits;
            {
              const py::gil_scoped_release release;
              logits = self.forward_batch(sequences, ids);
            }
            return to_bytes(logits);
          },
          py::arg("sequences"), py::arg("token_ids"))
      .def("reset", &Runner::reset)
      .def("profile",
           [](const Runner& self) {
             py::dict operations;
             for (const auto& [name, entry] : self.profile()) {
               operations[name.c_str()] = py::make_tuple(entry.num_calls, entry.seconds, entry.bytes);
             }
             return operations;
           })
      .def("reset_profile", &Runner::reset_profile);
}

}  // namespace tw::bindings
