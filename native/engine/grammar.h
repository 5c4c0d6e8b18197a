// A formal language that an answer must belong to, as the engine sees it: sets of tokens that may come next.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace tw {

// One answer's place in a language. Used by one thread at a time.
class Constraint {
 public:
  enum class Next {
    kTokens,    // `mask` says which
    kComplete,  // nothing may follow: the answer ends here
  };

  virtual ~Constraint() = default;
  // What may follow the tokens accepted so far. In `mask` [⌈vocab_size / 32⌉], bit i % 32 of word i / 32 is set for
  // each token i that may come next; where the answer may end, the end-of-generation tokens are among them. Throws
  // Error with kInvalidRequest if the language asks for more work or memory than it may.
  virtual Next next(std::vector<uint32_t>* mask) = 0;
  // Goes on by a token that the last mask had.
  virtual void accept(int32_t token) = 0;
};

// A compiled language. Any thread.
class Grammar {
 public:
  virtual ~Grammar() = default;
  // A place before the first token. Equal starts with equal tokens give equal masks.
  virtual std::unique_ptr<Constraint> start() const = 0;
};

}  // namespace tw
