// The mover: the least a program can do to move memory to another process, for comparison. It moves pages of a memfd over
// TCP on loopback, so many streams at once, each piece of 2 MiB over one of them, into a memfd that nobody has touched.
// Nothing is tracked, skipped, checked or framed.
//
//   mover MIB STREAMS                        prints the milliseconds from the first byte to the word that all have come
//   mover MIB STREAMS NAMESPACE ADDRESS      the same to an address of another network namespace, given by its file
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { STREAMS_MAX = 16 };
static const size_t PIECE = 2 << 20;

struct stream {
  pthread_t thread;
  int socket;
  size_t first;
};

static char *memory;
static size_t bytes;
static long streams;
static int is_sender;

static char *make(void) {
  int file = memfd_create("mover", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, bytes) < 0) err(1, "memfd");
  char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (at == MAP_FAILED) err(1, "mmap");
  return at;
}

static void *carry(void *argument) {
  struct stream *stream = argument;
  for (size_t piece = stream->first; piece < bytes; piece += PIECE * streams) {
    for (size_t done = 0; done < PIECE;) {
      char *at = memory + piece + done;
      ssize_t moved = is_sender ? write(stream->socket, at, PIECE - done) : read(stream->socket, at, PIECE - done);
      if (moved <= 0) err(1, "a stream");
      done += moved;
    }
  }
  return NULL;
}

static void carry_all(struct stream *all) {
  for (long at = 0; at < streams; at++) {
    all[at].first = at * PIECE;
    if (pthread_create(&all[at].thread, NULL, carry, &all[at])) errx(1, "a thread");
  }
  for (long at = 0; at < streams; at++) pthread_join(all[at].thread, NULL);
}

int main(int count, char **arguments) {
  if (count != 3 && count != 5) errx(2, "mover MIB STREAMS [NAMESPACE ADDRESS]");
  bytes = (size_t)atol(arguments[1]) << 20;
  streams = atol(arguments[2]);
  if (!bytes || bytes % PIECE || streams < 1 || streams > STREAMS_MAX) errx(2, "mover MIB STREAMS [NAMESPACE ADDRESS]");
  memory = make();
  uint64_t random = 88172645463325252;
  for (uint64_t *word = (uint64_t *)memory; word < (uint64_t *)(memory + bytes); word++) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    *word = random;
  }
  struct stream near[STREAMS_MAX], far[STREAMS_MAX];
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (count == 5 && inet_pton(AF_INET, arguments[4], &address.sin_addr) != 1) errx(2, "no address: %s", arguments[4]);
  // A socket stays in the namespace that it was made in.
  int here = open("/proc/self/ns/net", O_RDONLY), there = count == 5 ? open(arguments[3], O_RDONLY) : here;
  if (here < 0 || there < 0 || setns(there, CLONE_NEWNET)) err(1, "a network namespace");
  int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
  if (setns(here, CLONE_NEWNET)) err(1, "a network namespace");
  socklen_t length = sizeof address;
  if (bind(listener, (void *)&address, length) || listen(listener, STREAMS_MAX)) err(1, "listen");
  getsockname(listener, (void *)&address, &length);
  for (long at = 0; at < streams; at++) {
    near[at].socket = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(near[at].socket, (void *)&address, length)) err(1, "connect");
    far[at].socket = accept(listener, NULL, NULL);
    setsockopt(near[at].socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  }
  pid_t child = fork();
  if (child < 0) err(1, "fork");
  if (!child) {
    memory = make();
    carry_all(far);
    return write(far[0].socket, "!", 1) != 1;
  }
  is_sender = 1;
  struct timespec begun, ended;
  clock_gettime(CLOCK_MONOTONIC, &begun);
  carry_all(near);
  char word;
  if (read(near[0].socket, &word, 1) != 1) err(1, "the other end");
  clock_gettime(CLOCK_MONOTONIC, &ended);
  waitpid(child, NULL, 0);
  printf("%.3f\n", (ended.tv_sec - begun.tv_sec) * 1e3 + (ended.tv_nsec - begun.tv_nsec) / 1e6);
  return 0;
}
