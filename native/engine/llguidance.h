// Grammars through the llguidance library, which is opened at run time: JSON schemas and regular expressions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/grammar.h"

namespace tw {

namespace llguidance {
class Library;
class Tokenizer;
}  // namespace llguidance

// Compiles grammars over one vocabulary. Any thread.
class GrammarCompiler {
 public:
  // `library` is a file that exports llguidance's C interface. Throws Error with kUnavailable if it cannot be used.
  GrammarCompiler(const std::string& library, const std::vector<std::string>& vocabulary,
                  const std::vector<int32_t>& stop_token_ids);
  ~GrammarCompiler();

  // `kind` is "json_schema" or "regex". Takes as long as the grammar is complex, within fixed bounds. Throws Error with
  // kInvalidRequest and one line for the grammar's author.
  std::shared_ptr<const Grammar> compile(const std::string& kind, const std::string& text) const;

  const std::string& version() const;

 private:
  std::shared_ptr<const llguidance::Tokenizer> tokenizer_;
};

}  // namespace tw
