#include "engine/llguidance.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>

#include "core/error.h"

namespace tw {
namespace llguidance {
namespace {

// llguidance's C interface, as far as it is used here. Versions 1.9.x have it so.
constexpr const char* kVersion = "llguidance@1.9.";
constexpr uint32_t kNoToken = 0xFFFFFFFF;

struct TokenizerInit {
  size_t struct_size;
  uint32_t vocab_size;
  uint32_t tok_eos;
  const uint32_t* token_lens;
  const uint8_t* token_bytes;
  const char* tokenizer_json;
  bool tokenize_assumes_string;
  size_t (*tokenize)(const void*, const uint8_t*, size_t, uint32_t*, size_t);
  bool greedy_tokenize;
  const void* tokenize_user_data;
  const char* const* slices;
  const uint32_t* tok_eos_extra;
  uint32_t tok_eos_extra_count;
};

struct ParserLimits {
  size_t max_items_in_row;
  uint64_t initial_lexer_fuel;
  uint64_t step_lexer_fuel;
  size_t step_max_items;
  size_t max_lexer_states;
  size_t max_grammar_size;
  bool precompute_large_lexemes;
  bool verbose_errors;
};

struct ConstraintInit {
  const void* tokenizer;
  uint32_t log_buffer_level;
  uint32_t log_stderr_level;
  bool ff_tokens_ok;
  bool backtrack_ok;
  ParserLimits limits;
};

// Lexer states that one job may hold, 1–2 kB each.
constexpr size_t kMaxLexerStates = 20000;
// Compiling recurses as deep as the grammar nests.
constexpr size_t kCompileStackBytes = size_t{64} << 20;
constexpr size_t kMaxReasonBytes = 200;

// What went wrong, in one line for the grammar's author: of a message in several lines the one that names the error.
std::string one_line(std::string text) {
  if (text.rfind("panic", 0) == 0) return "it is not supported";
  if (text.rfind("NoExtension", 0) == 0) return "no text can satisfy it";
  constexpr const char* kMark = "\nerror: ";
  const size_t named = text.rfind(kMark);
  if (named != std::string::npos) text.erase(0, named + std::char_traits<char>::length(kMark));
  text.erase(std::min(text.find('\n'), text.size()));
  // What the author wrote may stand in it, and may be anything.
  for (char& c : text) {
    if (c < 0x20 || c > 0x7E) c = '?';
  }
  if (text.size() > kMaxReasonBytes) text.replace(kMaxReasonBytes, std::string::npos, "...");
  return text;
}

// Runs `body` on a thread with a stack of its own and waits for it; rethrows what it threw.
void with_large_stack(const std::function<void()>& body) {
  struct Call {
    const std::function<void()>* body;
    std::exception_ptr thrown;
  } call{&body, nullptr};
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kCompileStackBytes);
  pthread_t thread;
  const auto run = [](void* argument) -> void* {
    auto* self = static_cast<Call*>(argument);
    try {
      (*self->body)();
    } catch (...) {
      self->thrown = std::current_exception();
    }
    return nullptr;
  };
  const int failed = pthread_create(&thread, &attributes, run, &call);
  pthread_attr_destroy(&attributes);
  if (failed != 0) throw Error(ErrorCode::kOverloaded, "there is no memory to compile a grammar in");
  pthread_join(thread, nullptr);
  if (call.thrown) std::rethrow_exception(call.thrown);
}

}  // namespace

// The functions of an opened library. Never closed: it keeps state of its own.
class Library {
 public:
  explicit Library(const std::string& path) {
    void* const handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (handle == nullptr) throw Error(ErrorCode::kUnavailable, "llguidance cannot be loaded");
    find(handle, "llg_get_version", &get_version);
    version = get_version();
    if (version.rfind(kVersion, 0) != 0) {
      throw Error(ErrorCode::kUnavailable, "llguidance is " + version + ", not 1.9");
    }
    find(handle, "llg_new_tokenizer_v2", &new_tokenizer);
    find(handle, "llg_free_tokenizer", &free_tokenizer);
    find(handle, "llg_constraint_init_set_defaults", &set_defaults);
    find(handle, "llg_new_matcher", &new_matcher);
    find(handle, "llg_clone_matcher", &clone_matcher);
    find(handle, "llg_free_matcher", &free_matcher);
    find(handle, "llg_matcher_get_error", &get_error);
    find(handle, "llg_matcher_is_stopped", &is_stopped);
    find(handle, "llg_matcher_is_accepting", &is_accepting);
    find(handle, "llg_matcher_consume_token", &consume_token);
    find(handle, "llg_matcher_compute_mask_into", &compute_mask);
  }

  const char* (*get_version)();
  void* (*new_tokenizer)(const TokenizerInit*, char*, size_t);
  void (*free_tokenizer)(void*);
  void (*set_defaults)(void*, const void*);
  void* (*new_matcher)(const void*, const char*, const char*);
  void* (*clone_matcher)(const void*);
  void (*free_matcher)(void*);
  const char* (*get_error)(void*);
  bool (*is_stopped)(const void*);
  bool (*is_accepting)(void*);
  int32_t (*consume_token)(void*, uint32_t);
  int32_t (*compute_mask)(void*, uint32_t*, size_t);
  std::string version;

 private:
  template <typename Function>
  static void find(void* handle, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(handle, name));
    if (*function == nullptr) throw Error(ErrorCode::kUnavailable, std::string("llguidance lacks ") + name);
  }
};

class Tokenizer {
 public:
  Tokenizer(const std::string& path, const std::vector<std::string>& vocabulary,
            const std::vector<int32_t>& stop_token_ids)
      : library(path), num_words((vocabulary.size() + 31) / 32) {
    std::vector<uint32_t> lengths;
    std::string bytes;
    for (size_t id = 0; id < vocabulary.size(); ++id) {
      // An end-of-generation token is no text, whatever it spells.
      const bool stops =
          std::find(stop_token_ids.begin(), stop_token_ids.end(), static_cast<int32_t>(id)) != stop_token_ids.end();
      lengths.push_back(stops ? 0 : static_cast<uint32_t>(vocabulary[id].size()));
      if (!stops) bytes += vocabulary[id];
    }
    const std::vector<uint32_t> stops(stop_token_ids.begin(), stop_token_ids.end());
    TokenizerInit init{};
    init.struct_size = sizeof init;
    init.vocab_size = static_cast<uint32_t>(vocabulary.size());
    init.tok_eos = stops.empty() ? kNoToken : stops[0];
    init.token_lens = lengths.data();
    init.token_bytes = reinterpret_cast<const uint8_t*>(bytes.data());
    init.greedy_tokenize = true;  // only masks are asked for, and those do not depend on how text is tokenised
    if (stops.size() > 1) {
      init.tok_eos_extra = stops.data() + 1;
      init.tok_eos_extra_count = static_cast<uint32_t>(stops.size() - 1);
    }
    std::array<char, 256> reason{};
    handle_ = library.new_tokenizer(&init, reason.data(), reason.size());
    if (handle_ == nullptr) {
      throw Error(ErrorCode::kUnavailable, "llguidance refuses the vocabulary: " + one_line(reason.data()));
    }
  }
  ~Tokenizer() { library.free_tokenizer(handle_); }
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // A matcher in its first state. Throws kInvalidRequest.
  void* compile(const std::string& kind, const std::string& text) const {
    // Larger than the struct is here, since the library fills in what it knows.
    union {
      ConstraintInit init;
      std::array<std::byte, 1024> room;
    } space;
    space.room.fill(std::byte{0});
    library.set_defaults(&space, handle_);
    space.init.log_buffer_level = 0;
    space.init.log_stderr_level = 0;
    space.init.limits.max_lexer_states = kMaxLexerStates;
    space.init.limits.verbose_errors = false;
    void* const matcher = library.new_matcher(&space, kind.c_str(), text.c_str());
    const char* const error = library.get_error(matcher);
    if (error == nullptr) return matcher;
    const std::string reason = one_line(error);
    library.free_matcher(matcher);
    throw Error(ErrorCode::kInvalidRequest, reason);
  }

  const Library library;
  const size_t num_words;  // of a mask

 private:
  void* handle_;
};

namespace {

class Matcher final : public Constraint {
 public:
  Matcher(std::shared_ptr<const Tokenizer> tokenizer, void* handle)
      : tokenizer_(std::move(tokenizer)), handle_(handle) {}
  ~Matcher() override { tokenizer_->library.free_matcher(handle_); }
  Matcher(const Matcher&) = delete;
  Matcher& operator=(const Matcher&) = delete;

  Next next(std::vector<uint32_t>* mask) override {
    const Library& library = tokenizer_->library;
    check();
    if (library.is_stopped(handle_)) return Next::kComplete;
    mask->assign(tokenizer_->num_words, 0);
    if (library.compute_mask(handle_, mask->data(), mask->size() * sizeof(uint32_t)) != 0) check();
    if (std::any_of(mask->begin(), mask->end(), [](uint32_t word) { return word != 0; })) return Next::kTokens;
    if (library.is_accepting(handle_)) return Next::kComplete;
    throw Error(ErrorCode::kInvalidRequest, "no text can satisfy it");
  }

  void accept(int32_t token) override {
    if (tokenizer_->library.consume_token(handle_, static_cast<uint32_t>(token)) != 0) check();
  }

 private:
  void check() const {
    const char* const error = tokenizer_->library.get_error(handle_);
    if (error != nullptr) throw Error(ErrorCode::kInvalidRequest, one_line(error));
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
  void* handle_;
};

class CompiledGrammar final : public Grammar {
 public:
  CompiledGrammar(std::shared_ptr<const Tokenizer> tokenizer, void* first)
      : tokenizer_(std::move(tokenizer)), first_(first) {}
  ~CompiledGrammar() override { tokenizer_->library.free_matcher(first_); }
  CompiledGrammar(const CompiledGrammar&) = delete;
  CompiledGrammar& operator=(const CompiledGrammar&) = delete;

  std::unique_ptr<Constraint> start() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::make_unique<Matcher>(tokenizer_, tokenizer_->library.clone_matcher(first_));
  }

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  mutable std::mutex mutex_;  // two threads may not clone one matcher
  void* first_;               // never used but to clone it
};

}  // namespace
}  // namespace llguidance

GrammarCompiler::GrammarCompiler(const std::string& library, const std::vector<std::string>& vocabulary,
                                 const std::vector<int32_t>& stop_token_ids)
    : tokenizer_(std::make_shared<llguidance::Tokenizer>(library, vocabulary, stop_token_ids)) {}

GrammarCompiler::~GrammarCompiler() = default;

std::shared_ptr<const Grammar> GrammarCompiler::compile(const std::string& kind, const std::string& text) const {
  std::shared_ptr<const Grammar> grammar;
  llguidance::with_large_stack([&] {
    grammar = std::make_shared<llguidance::CompiledGrammar>(tokenizer_, tokenizer_->compile(kind, text));
    // A language without a first token, or one too costly for it, is the author's mistake: say so at once.
    std::vector<uint32_t> mask;
    grammar->start()->next(&mask);
  });
  return grammar;
}

const std::string& GrammarCompiler::version() const { return tokenizer_->library.version; }

}  // namespace tw
