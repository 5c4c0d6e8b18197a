#include "health/server.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "core/error.h"

namespace tw::health {
namespace {

// Between two looks at who is overdue and at what has become stale.
constexpr int kTickMs = 1000;
// Taken of one peer or of those who knock before the others have their turn. A check has some hundred bytes.
constexpr size_t kReadBytes = 2048;
constexpr int kMostAccepted = 64;
constexpr int kMostEvents = 64;
// A peer whose machine vanished is given up after kKeepAliveS + kProbes × kProbeS, or this long after bytes were sent.
constexpr int kKeepAliveS = 30;
constexpr int kProbeS = 10;
constexpr int kProbes = 3;
constexpr int kUnackedMs = 30'000;

int checked(int result, const char* what) {
  if (result < 0) throw Error(ErrorCode::kInternal, std::string("the health port has no ") + what);
  return result;
}

std::vector<Descriptor> owned(const std::vector<int>& fds) {
  std::vector<Descriptor> descriptors;
  descriptors.reserve(fds.size());
  for (const int fd : fds) descriptors.emplace_back(fd);
  return descriptors;
}

// Failures are left alone: the socket works without.
void set_option(int fd, int level, int option, int value) { setsockopt(fd, level, option, &value, sizeof value); }

void set_options(int fd) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepAliveS);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, kProbeS);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, kProbes);
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kUnackedMs);
}

}  // namespace

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

HealthServer::HealthServer(std::vector<int> listening, std::vector<std::string> services, const ServerLimits& limits)
    : limits_(limits),
      listening_(owned(listening)),
      table_(std::move(services), limits.stale_after),
      epoll_(checked(epoll_create1(EPOLL_CLOEXEC), "epoll")),
      wake_(checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd")) {
  await_events(wake_.get(), EPOLLIN, true);
  for (const Descriptor& socket : listening_) {
    checked(fcntl(socket.get(), F_SETFL, fcntl(socket.get(), F_GETFL) | O_NONBLOCK), "socket");
    await_events(socket.get(), EPOLLIN, true);
  }
  thread_ = std::thread([this] { run(); });
}

HealthServer::~HealthServer() { stop(); }

void HealthServer::stop() {
  if (!thread_.joinable()) return;
  is_stopping_ = true;
  eventfd_write(wake_.get(), 1);
  thread_.join();
  listening_.clear();
}

void HealthServer::publish(const std::vector<bool>& is_serving) {
  if (table_.publish(is_serving, Clock::now())) eventfd_write(wake_.get(), 1);
}

void HealthServer::run() {
  std::array<epoll_event, kMostEvents> events;
  Clock::time_point ticked_at = Clock::now();
  while (!is_stopping_) {
    const int ready =
        epoll_wait(epoll_.get(), events.data(), kMostEvents, peers_.empty() && is_accepting_ ? -1 : kTickMs);
    const auto now = Clock::now();
    const bool ticks = now - ticked_at >= std::chrono::milliseconds(kTickMs);
    bool has_changed = false;
    std::vector<int> touched;
    for (int i = 0; i < ready; ++i) {
      const int fd = events[static_cast<size_t>(i)].data.fd;
      const auto peer = peers_.find(fd);
      if (peer != peers_.end()) {
        if ((events[static_cast<size_t>(i)].events & ~EPOLLOUT) != 0) read_from(*peer->second, now);
        touched.push_back(fd);
      } else if (fd == wake_.get()) {
        eventfd_t count = 0;
        eventfd_read(fd, &count);
        has_changed = true;
      } else {
        accept_from(fd, now);
      }
    }
    // Not before all events were looked at: a new socket could have the number of one that was closed.
    if (has_changed || ticks) {
      touched.clear();
      for (const auto& [fd, peer] : peers_) touched.push_back(fd);
      ticked_at = now;
      if (!is_accepting_) listen_again();
    }
    for (const int fd : touched) {
      const auto peer = peers_.find(fd);
      if (has_changed || ticks) peer->second->connection.advance(now);
      if (!flush(*peer->second, now) || is_overdue(*peer->second, now)) {
        // Closing is not enough: a child between fork and exec has the socket too, and its events would go on.
        epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
        peers_.erase(peer);
      }
    }
  }
  for (auto& [fd, peer] : peers_) {
    peer->connection.go_away(Http2Code::kNoError);
    flush(*peer, Clock::now());
  }
  peers_.clear();
}

void HealthServer::accept_from(int listening, Clock::time_point now) {
  for (int i = 0; i < kMostAccepted; ++i) {
    Descriptor socket(accept4(listening, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket.get() < 0) {
      // Out of descriptors, most likely: the next tick tries again, where waiting for the event would spin.
      if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
        is_accepting_ = false;
        for (const Descriptor& one : listening_) await_events(one.get(), 0, false);
      }
      return;
    }
    if (peers_.size() >= limits_.most_connections) continue;
    set_options(socket.get());
    const int fd = socket.get();
    const auto peer =
        peers_.emplace(fd, std::make_unique<Peer>(std::move(socket), table_, endings_, limits_.connection, now)).first;
    peer->second->awaited_events = EPOLLIN;
    await_events(fd, EPOLLIN, true);
    flush(*peer->second, now);
  }
}

void HealthServer::listen_again() {
  is_accepting_ = true;
  for (const Descriptor& socket : listening_) await_events(socket.get(), EPOLLIN, false);
}

void HealthServer::read_from(Peer& peer, Clock::time_point now) {
  std::array<char, kReadBytes> bytes;
  const ssize_t size = recv(peer.socket.get(), bytes.data(), bytes.size(), 0);
  if (size > 0) {
    peer.active_at = now;
    peer.connection.receive(std::string_view(bytes.data(), static_cast<size_t>(size)), now);
  } else if (size == 0) {
    peer.connection.go_away(Http2Code::kNoError);
  } else if (errno != EAGAIN && errno != EINTR) {
    peer.connection.go_away(Http2Code::kNoError);
    peer.connection.output().clear();  // nobody is there to take it
  }
}

bool HealthServer::flush(Peer& peer, Clock::time_point now) {
  std::string& output = peer.connection.output();
  while (!output.empty()) {
    const ssize_t size = send(peer.socket.get(), output.data(), output.size(), MSG_NOSIGNAL);
    if (size < 0 && errno == EINTR) continue;
    if (size < 0 && errno != EAGAIN) return false;
    if (size < 0) break;
    peer.active_at = now;
    output.erase(0, static_cast<size_t>(size));
    if (output.empty()) peer.connection.advance(now);  // what there was no room for
  }
  if (peer.connection.is_over() && output.empty()) return false;
  // Whoever does not read their answers is not read either.
  const bool reads = !peer.connection.is_over() && output.size() <= Connection::kMostUnsentBytes;
  const uint32_t events = (reads ? uint32_t{EPOLLIN} : 0U) | (output.empty() ? 0U : uint32_t{EPOLLOUT});
  if (events != peer.awaited_events) await_events(peer.socket.get(), events, false);
  peer.awaited_events = events;
  return true;
}

bool HealthServer::is_overdue(const Peer& peer, Clock::time_point now) const {
  if (!peer.connection.has_begun()) return now - peer.opened_at > limits_.handshake_timeout;
  const bool waits = peer.connection.has_watchers() && !peer.connection.is_over();
  return !waits && now - peer.active_at > limits_.idle_timeout;
}

void HealthServer::await_events(int fd, uint32_t events, bool is_new) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  epoll_ctl(epoll_.get(), is_new ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
}

}  // namespace tw::health
