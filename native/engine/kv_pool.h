// The ledger of KV blocks: who holds which, and which finished prefixes can be used again. Ids only, no memory.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <list>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/sha256.h"
#include "core/step.h"

namespace tw {

// What the prefix cache holds for one salt.
struct CacheShare {
  int32_t cached_blocks = 0;  // held by nobody, findable
  int32_t shared_blocks = 0;  // findable and held by live sequences
};

// By salt; the empty salt is that of requests without one.
using CacheContents = std::map<std::string, CacheShare>;

// Every block is exactly one of free, used (references > 0) or cached (references = 0, content still findable), so
// `free + used + cached = total` always.
//
// A full block can be published under a hash chained over (salt, parent block, its tokens). A later prompt that begins
// with the same tokens under the same salt shares the block; token ids and salt are compared on a hit, so equal hashes
// alone never share. Cached blocks are given up least recently used first.
class KvPool {
 public:
  using Hash = Sha256::Digest;

  KvPool(int32_t num_blocks, bool prefix_cache);

  int32_t num_total() const { return static_cast<int32_t>(blocks_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_cached() const { return static_cast<int32_t>(lru_.size()); }
  int32_t num_used() const { return num_total() - num_free() - num_cached(); }

  // Whether `count` more blocks can be had, if need be by giving up cached ones.
  bool can_allocate(int32_t count) const { return num_free() + num_cached() >= count; }
  // A block with one reference; can_allocate(1) must hold.
  int32_t allocate();
  void release(int32_t block);

  // The root of the chain for a salt.
  static Hash root_hash(const std::string& salt);
  static Hash chain_hash(const Hash& parent, const int32_t* tokens);

  // Blocks that hold the longest published prefix of tokens[0 … num_tokens), each with one more reference.
  std::vector<int32_t> acquire_prefix(const std::string& salt, const int32_t* tokens, int32_t num_tokens);
  // Makes a full block, whose content is computed, findable. `parent` is the chain hash before it. Returns its own
  // chain hash. If the same content is already published, that other block stays the findable one.
  Hash publish(int32_t block, const std::string& salt, const Hash& parent, const int32_t* tokens);
  // Gives up all cached blocks; returns how many.
  int32_t clear_cache();
  CacheContents cache_contents() const;
  // Cached blocks given up for new content, since the start.
  int64_t num_evictions() const { return num_evictions_; }

  // Compares every count with `held`, the block tables of all live sequences. Empty if they agree.
  std::string audit(const std::vector<const std::vector<int32_t>*>& held) const;

 private:
  struct Block {
    int32_t references = 0;
    bool published = false;
    Hash hash{};
    Hash parent{};
    std::string salt;
    std::array<int32_t, kBlockTokens> tokens{};
    std::list<int32_t>::iterator lru;  // valid while cached
  };

  // A digest's bytes are as good as random, so any of them place it well.
  struct FirstBytes {
    size_t operator()(const Hash& hash) const {
      size_t bytes;
      std::memcpy(&bytes, hash.data(), sizeof(bytes));
      return bytes;
    }
  };

  void withdraw(int32_t block);
  const Block* find(const Hash& hash, const std::string& salt, const Hash& parent, const int32_t* tokens,
                    int32_t* index) const;

  const bool prefix_cache_;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_;  // used as a stack: the same few blocks serve a light load
  std::list<int32_t> lru_;     // cached blocks, least recently used first
  std::unordered_map<Hash, int32_t, FirstBytes> published_;
  int64_t num_evictions_ = 0;
};

}  // namespace tw
