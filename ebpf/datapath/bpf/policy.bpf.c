// SPDX-License-Identifier: Apache-2.0
// NetworkPolicy at a pod's host-side interface and at the host's NICs.
//
//   na_from_pod    pod interface, ingress: source check, egress policy
//   na_to_pod      pod interface, egress: ingress policy; egress policy of
//                  local pods' flows that were translated on the way
//   na_uplink_out  NIC, egress: egress policy of flows that were translated
//   na_uplink_in   NIC, ingress: drops early what na_to_pod would drop
//   na_xdp         NIC, if asked for: the same before the stack sees the packet
//
// A packet is judged by arrays: row[class of the peer] is a profile,
// profile[class of the port] a bit. Replies need conntrack, which is kept per
// pod interface; each reply is judged again by the policy that let the flow be
// opened, so that a revoked flow stops both ways at once. What the tables are
// and in which order they change: package policy.
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define ALLOW (-1) /* TCX_NEXT, TC_ACT_UNSPEC: let other programs see it */
#define DROP 2

/* Set by the loader before the programs are loaded. */
volatile const __u32 cfg_hz = 250;           /* jiffies a second */
volatile const __u32 cfg_mark = 1 << 20;     /* bit: judge egress after translation */
volatile const __u32 cfg_strict = 0;         /* no TCP reply without conntrack */
volatile const __u32 cfg_keep = 0;           /* established flows outlive revocation */
volatile const __u32 cfg_events = 100;       /* events per second, CPU and reason */
volatile const __u32 cfg_profiles = 4096;    /* profiles in a bank */
volatile const __u32 cfg_peers = 49;         /* 64 - log2 of the buckets of peers4 and peers6 */
volatile const __u64 cfg_seed = 0x9e3779b97f4a7c15; /* of their hash; odd */

#define ROW_CELLS 64
#define PORT_BLOCKS 3072 /* 3 protocols, 64 ports a block */
#define BITMAP 128
#define NEAR 65536 /* interfaces with lower numbers are found in an array, others by hash */

enum { WORLD = 1, CLASS_MASK = 0x7fffffff, CLASS_NODE = 1u << 31 };
enum { P_DENY, P_ALLOW, P_DEFER, P_FIRST };
enum { IN, OUT };

/* An endpoint's word: bits 0-19 the row for ingress, 20-39 for egress (in
 * blocks), 40-43 log2 of the blocks in a row, then flags. */
#define W_ACTIVE (1ull << 44)
#define W_ISO(dir) (1ull << (45 + (dir)))
#define W_AUDIT (1ull << 47)
#define W_DEGRADED (1ull << 48) /* its tables could not be written: nothing new */

struct endpoint {
	__u64 word;
	__u32 class4, class6; /* of its own addresses */
	__u32 ip4;
	__u32 ifindex;
	__u32 ip6[4];
	__u32 pad[6];
};

struct state {
	__u32 bank;
	__u32 cidrs4, cidrs6; /* whether the tries hold anything */
	__u32 pad;
};

struct lpm4 { __u32 bits; __u32 addr; };
struct lpm6 { __u32 bits; __u32 addr[4]; };

/* Conntrack's keys, of one pod's interface: its low 24 bits and the protocol. */
struct ct4 { __u32 where, local, remote; __u16 lport, rport; };
struct ct6 { __u32 where, local[4], remote[4]; __u16 lport, rport; };
union flow { struct ct4 v4; struct ct6 v6; };
/* passed is what let the last packet of each direction pass by policy: the
 * generation of the tables then, and a reason that JUDGED. */
struct ct_value { __u32 last; __u32 flags; __u32 passed[2]; };

enum {
	CT_OUT = 1,    /* the pod opened it */
	CT_IN = 2,     /* the peer opened it */
	CT_HOST = 4,   /* the host did */
	CT_DEFER = 8,  /* judged after translation: the reply comes from another address */
	CT_REPLIED = 16,
	CT_CLOSING = 32,
};

struct frag_key { __u32 src[4], dst[4]; __u32 id; __u32 ifindex; __u32 proto; };
struct frag_ports { __u16 sport, dport; __u32 last; };

struct counter { __u64 packets, bytes; };
struct window { __u32 second, count; };

/* What known has found in conntrack a moment ago, of each CPU by itself: a lookup
 * there costs eight cache lines, one here costs two. */
#define RECENT 128 /* flows of a direction, a power of 2 */
struct known {
	union flow flow;
	__u32 v6;
	__u32 passed; /* as in conntrack */
	__u32 until;  /* jiffies: then conntrack has to hear of the flow */
	__u32 pad[3];
};
struct recent {
	struct counter counters[2][8]; /* direction, reason */
	struct known flows[2][RECENT];
};

struct event {
	__u64 time; /* ktime, ns */
	__u32 endpoint, ifindex, ingress, class;
	__u32 src[4], dst[4];
	__u16 sport, dport;
	__u16 profile, len;
	__u8 hook, reason, proto, flags; /* flags: 1 IPv6, 2 audit, 4 dropped */
	__u8 tcp, pad[3];
};

#define MAP(name_, type_, key_, value_, max_, flags_) \
	struct { \
		__uint(type, BPF_MAP_TYPE_##type_); \
		__type(key, key_); \
		__type(value, value_); \
		__uint(max_entries, max_); \
		__uint(map_flags, flags_); \
	} name_ SEC(".maps")

struct block { __u16 cell[ROW_CELLS]; };
struct bitmap { __u8 bits[BITMAP]; };
struct addr6 { __u32 a[4]; };

/* Buckets of the hash tables of peers' addresses, a cache line each: a lookup
 * costs one miss, where a hash map's costs three (bucket, element, its
 * neighbour). The loader fills them (peers.go); what has no place in its bucket
 * is in the trie. A class of 0 is no entry. */
struct peers4 { __u64 slot[8]; };                           /* address, class << 32 */
struct peers6 { __u32 class[3]; __u32 pad; __u64 addr[3][2]; };

MAP(ep_if, HASH, __u32, __u32, 4096, BPF_F_NO_PREALLOC);
MAP(ep_near, ARRAY, __u32, __u32, NEAR, BPF_F_MMAPABLE);
MAP(endpoints, ARRAY, __u32, struct endpoint, 4096, BPF_F_MMAPABLE);
MAP(ep_ip4, HASH, __u32, __u32, 8192, BPF_F_NO_PREALLOC);
MAP(ep_ip6, HASH, struct addr6, __u32, 8192, BPF_F_NO_PREALLOC);
MAP(peers4, ARRAY, __u32, struct peers4, 32768, BPF_F_MMAPABLE);
MAP(peers6, ARRAY, __u32, struct peers6, 32768, BPF_F_MMAPABLE);
MAP(cidr4, LPM_TRIE, struct lpm4, __u32, 131072, BPF_F_NO_PREALLOC);
MAP(cidr6, LPM_TRIE, struct lpm6, __u32, 131072, BPF_F_NO_PREALLOC);
MAP(rows, ARRAY, __u32, struct block, 65536, BPF_F_MMAPABLE);
MAP(ports, ARRAY, __u32, struct block, 2 * PORT_BLOCKS, BPF_F_MMAPABLE);
MAP(profiles, ARRAY, __u32, struct bitmap, 2 * 4096, BPF_F_MMAPABLE);
MAP(state, ARRAY, __u32, struct state, 1, BPF_F_MMAPABLE);
MAP(ct4, LRU_HASH, struct ct4, struct ct_value, 65536, 0);
MAP(ct6, LRU_HASH, struct ct6, struct ct_value, 65536, 0);
/* Counts the changes of what verdicts follow from: conntrack's verdicts of
 * another generation are void. Pinned with conntrack, shared by all processes. */
MAP(generation, ARRAY, __u32, __u32, 1, BPF_F_MMAPABLE);
MAP(frags, LRU_HASH, struct frag_key, struct frag_ports, 2048, 0);
MAP(counters, PERCPU_ARRAY, __u32, struct counter, 160, 0);
MAP(recent, PERCPU_ARRAY, __u32, struct recent, 1, 0);
MAP(windows, PERCPU_ARRAY, __u32, struct window, 32, 0);
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} events SEC(".maps");

enum hook { H_FROM_POD, H_TO_POD, H_UPLINK_IN, H_UPLINK_OUT, H_XDP };

enum reason {
	R_POLICY, R_OPEN, R_REPLY, R_INFERRED, R_RELATED, R_HOST, R_HAIRPIN, R_NEIGHBOUR, R_DEFERRED, R_PASS,
	R_NOT_READY = 16, R_SPOOF, R_POLICY_IN, R_POLICY_OUT, R_FRAGMENT, R_MALFORMED, R_NOT_IP, R_DEFERRED_OUT,
	R_EARLY, R_DEGRADED, R_REVOKED,
};
#define DROPPED(r) ((r) >= R_NOT_READY)
#define JUDGED(r) ((r) <= R_REPLY || (r) == R_HOST)
#define REASON_BITS 3

/* With this in cb[0] a test run changes nothing and finds the reason in cb[1],
 * the class in cb[2] and the profile in cb[3]. */
#define DRY32 0x61647279u

struct packet {
	__u32 src[4], dst[4]; /* IPv4: the first word */
	__u16 sport, dport;   /* host order; of an echo both are its identifier */
	__u8 proto;
	__u8 tcp;             /* flags */
	__u8 later;           /* a fragment that is not the first */
	__u8 error;           /* an ICMP error, about the flow below */
	__u8 port;            /* index of the port table, 3 for protocols without */
	__u8 iproto, iport;
	__u8 pad;
	__u32 isrc[4], idst[4];
	__u16 isport, idport;
	__u32 class, profile; /* for events: what decided */
	__u32 ifindex, ingress; /* of the context, read once */
	__u32 dry;
	__u32 generation; /* read before any table */
	__u32 judged; /* this packet's verdict may stand for the flow's direction */
};

#define SYN 2
#define FIN 1
#define RST 4
#define ACK 16
#define OPENS(p) ((p)->proto == 6 && ((p)->tcp & (SYN | ACK)) == SYN)

enum parsed { PARSED, NEIGHBOUR, NOT_IP, MALFORMED, UNKNOWN_FRAGMENT };

static __always_inline __u8 port_index(__u8 proto)
{
	return proto == 6 ? 0 : proto == 17 ? 1 : proto == 132 ? 2 : 3;
}

static __always_inline __u32 generation_now(void)
{
	__u32 zero = 0, *g = bpf_map_lookup_elem(&generation, &zero);

	return g ? READ_ONCE(*g) << REASON_BITS : 0;
}

/* start clears p and copies what is used of the context: loads from it at
 * addresses that the compiler computed are refused. */
static __always_inline void start(struct __sk_buff *skb, struct packet *p)
{
	__builtin_memset(p, 0, sizeof(*p));
	p->ifindex = READ_ONCE(skb->ifindex);
	p->ingress = READ_ONCE(skb->ingress_ifindex);
	p->dry = READ_ONCE(skb->cb[0]) == DRY32;
	p->generation = generation_now();
}

static __always_inline void frag_key_of(struct frag_key *k, struct __sk_buff *skb, struct packet *p, __u32 id)
{
	__builtin_memcpy(k->src, p->src, 16);
	__builtin_memcpy(k->dst, p->dst, 16);
	k->id = id;
	k->ifindex = p->ifindex;
	k->proto = p->proto;
}

/* later_fragment finds the ports that the first fragment carried. */
static __noinline int later_fragment(struct __sk_buff *skb, struct packet *p, __u32 id)
{
	struct frag_key k;
	struct frag_ports *f;

	if (!p)
		return 0;
	frag_key_of(&k, skb, p, id);
	f = bpf_map_lookup_elem(&frags, &k);
	if (!f || (__u32)bpf_jiffies64() - f->last > 60 * cfg_hz)
		return 0;
	p->sport = f->sport;
	p->dport = f->dport;
	return 1;
}

static __noinline int first_fragment(struct __sk_buff *skb, struct packet *p, __u32 id)
{
	struct frag_key k;
	struct frag_ports f;

	if (!p)
		return 0;
	frag_key_of(&k, skb, p, id);
	f.sport = p->sport;
	f.dport = p->dport;
	f.last = (__u32)bpf_jiffies64();
	bpf_map_update_elem(&frags, &k, &f, BPF_ANY);
	return 0;
}

/* inner reads the packet that an ICMP error is about, at off. */
static __noinline int inner(struct __sk_buff *skb, struct packet *p, __u32 off, __u32 v6)
{
	__u8 b[40] = {};
	__u16 port[2];
	__u32 len = 20;

	if (!p)
		return 0;
	if (v6) {
		if (bpf_skb_load_bytes(skb, off, b, 40))
			return 0;
		__builtin_memcpy(p->isrc, b + 8, 16);
		__builtin_memcpy(p->idst, b + 24, 16);
		p->iproto = b[6];
		len = 40;
	} else {
		if (bpf_skb_load_bytes(skb, off, b, 20))
			return 0;
		__builtin_memcpy(p->isrc, b + 12, 4);
		__builtin_memcpy(p->idst, b + 16, 4);
		p->iproto = b[9];
		len = (b[0] & 15) * 4;
		if ((((__u16)b[6] << 8 | b[7]) & 0x1fff) != 0)
			return 0;
	}
	p->iport = port_index(p->iproto);
	if (p->iproto == 1 || p->iproto == 58) {
		if (bpf_skb_load_bytes(skb, off + len + 4, port, 2))
			return 0;
		p->isport = p->idport = ntohs(port[0]);
	} else if (p->iport < 3) {
		if (bpf_skb_load_bytes(skb, off + len, port, 4))
			return 0;
		p->isport = ntohs(port[0]);
		p->idport = ntohs(port[1]);
	}
	p->error = 1;
	return 1;
}

/* ext6 walks over extension headers. It returns the offset of what follows,
 * negative if it cannot; a fragment's identity goes to frag. */
struct ext { __u32 proto, frag_id, frag_off, fragment; };
static __noinline int ext6(struct __sk_buff *skb, struct ext *e)
{
	__u32 off = 54;
	__u8 b[8];

	if (!e)
		return -1;
	for (int i = 0; i < 8; i++) {
		switch (e->proto) {
		case 0: case 43: case 60: case 51:
			if (bpf_skb_load_bytes(skb, off, b, 2))
				return -1;
			off += e->proto == 51 ? (b[1] + 2) * 4 : (b[1] + 1) * 8;
			e->proto = b[0];
			break;
		case 44:
			if (bpf_skb_load_bytes(skb, off, b, 8))
				return -1;
			e->fragment = 1;
			e->frag_off = ((__u32)b[2] << 8 | b[3]) & 0xfff8;
			__builtin_memcpy(&e->frag_id, b + 4, 4);
			e->proto = b[0];
			off += 8;
			if (e->frag_off)
				return off;
			break;
		default:
			return off;
		}
	}
	return -1;
}

/* transport reads what a protocol carries at off. */
static __always_inline int transport(struct __sk_buff *skb, struct packet *p, __u32 off, bool v6)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 b[16];

	p->port = port_index(p->proto);
	if (p->port == 0) {
		if (off == (v6 ? 54 : 34) && data + (v6 ? 54 : 34) + 14 <= end)
			__builtin_memcpy(b, data + (v6 ? 54 : 34), 14);
		else if (bpf_skb_load_bytes(skb, off, b, 14))
			return MALFORMED;
		p->tcp = b[13];
	} else if (p->port < 3) {
		if (off == (v6 ? 54 : 34) && data + (v6 ? 54 : 34) + 4 <= end)
			__builtin_memcpy(b, data + (v6 ? 54 : 34), 4);
		else if (bpf_skb_load_bytes(skb, off, b, 4))
			return MALFORMED;
	} else if (p->proto == (v6 ? 58 : 1)) {
		if (bpf_skb_load_bytes(skb, off, b, 8))
			return MALFORMED;
		if (v6 && b[0] >= 130 && (b[0] <= 137 || b[0] == 143)) /* MLD, ND: never leave the link */
			return NEIGHBOUR;
		if (v6 ? b[0] < 128 : (b[0] == 3 || b[0] == 4 || b[0] == 11 || b[0] == 12)) {
			inner(skb, p, off + 8, v6);
			return PARSED;
		}
		p->sport = p->dport = (__u16)b[4] << 8 | b[5];
		return PARSED;
	} else {
		return PARSED;
	}
	p->sport = (__u16)b[0] << 8 | b[1];
	p->dport = (__u16)b[2] << 8 | b[3];
	return PARSED;
}

static __always_inline int parse4(struct __sk_buff *skb, struct packet *p)
{
	struct eth_ip4 *h = (void *)(long)skb->data;
	__u32 off, frag, id;
	int r;

	if ((void *)(h + 1) > (void *)(long)skb->data_end)
		return MALFORMED;
	p->src[0] = h->saddr;
	p->dst[0] = h->daddr;
	p->proto = h->protocol;
	off = 14 + (h->ihl_version & 15) * 4;
	if (h->ihl_version < 0x45 || h->ihl_version > 0x4f)
		return MALFORMED;
	frag = ntohs(h->frag_off) & 0x3fff;
	id = h->id;
	if (__builtin_expect(frag & 0x1fff, 0)) {
		p->later = 1;
		p->port = port_index(p->proto);
		if (p->proto == 6 && (frag & 0x1fff) == 1) /* would write over the flags of the first */
			return MALFORMED;
		return p->port == 3 || later_fragment(skb, p, id) ? PARSED : UNKNOWN_FRAGMENT;
	}
	r = transport(skb, p, off, false);
	if (__builtin_expect(frag && r == PARSED && p->port < 3, 0))
		first_fragment(skb, p, id);
	return r;
}

static __always_inline int parse6(struct __sk_buff *skb, struct packet *p)
{
	struct eth_ip6 *h = (void *)(long)skb->data;
	struct ext e = {};
	int off = 54, r;

	if ((void *)(h + 1) > (void *)(long)skb->data_end)
		return MALFORMED;
	__builtin_memcpy(p->src, h->saddr, 16);
	__builtin_memcpy(p->dst, h->daddr, 16);
	e.proto = h->nexthdr;
	if (__builtin_expect(e.proto == 0 || e.proto == 43 || e.proto == 44 || e.proto == 51 || e.proto == 60, 0)) {
		off = ext6(skb, &e);
		if (off < 0)
			return MALFORMED;
	}
	p->proto = e.proto;
	if (e.fragment && e.frag_off) {
		p->later = 1;
		p->port = port_index(p->proto);
		if (p->proto == 6 && e.frag_off == 8)
			return MALFORMED;
		return p->port == 3 || later_fragment(skb, p, e.frag_id) ? PARSED : UNKNOWN_FRAGMENT;
	}
	r = transport(skb, p, off, true);
	if (e.fragment && r == PARSED && p->port < 3)
		first_fragment(skb, p, e.frag_id);
	return r;
}

static __always_inline __u16 ethertype(struct __sk_buff *skb)
{
	struct eth_ip4 *h = (void *)(long)skb->data;

	if ((void *)h + 54 > (void *)(long)skb->data_end && skb->len > skb->data_end - skb->data)
		bpf_skb_pull_data(skb, skb->len < 128 ? skb->len : 128);
	h = (void *)(long)skb->data;
	if ((void *)h + 14 > (void *)(long)skb->data_end)
		return 0;
	return ntohs(h->proto);
}

/* endpoint_of finds an interface's endpoint; its number goes to id. */
static __always_inline struct endpoint *endpoint_of(__u32 ifindex, __u32 *id)
{
	__u32 *v;

	if (ifindex < NEAR) { /* number + 1 */
		v = bpf_map_lookup_elem(&ep_near, &ifindex);
		if (!v || !*v)
			return NULL;
		*id = *v - 1;
	} else {
		v = bpf_map_lookup_elem(&ep_if, &ifindex);
		if (!v)
			return NULL;
		*id = *v;
	}
	return bpf_map_lookup_elem(&endpoints, id);
}

static __always_inline __u32 peer4(__u32 addr)
{
	__u32 n = addr * cfg_seed >> cfg_peers;
	struct peers4 *b = bpf_map_lookup_elem(&peers4, &n);

	if (!b)
		return 0;
#pragma unroll
	for (int i = 0; i < 8; i++) {
		__u64 s = READ_ONCE(b->slot[i]);

		if ((__u32)s == addr)
			return s >> 32;
	}
	return 0;
}

/* peer6 reads a class before its address: the loader writes them the other way
 * round, and uses no slot again before a grace period. */
static __always_inline __u32 peer6(const __u32 *addr)
{
	__u64 high = (__u64)addr[1] << 32 | addr[0], low = (__u64)addr[3] << 32 | addr[2], h = high * cfg_seed;
	struct peers6 *b;
	__u32 n;

	h = (h >> 32 ^ low) * cfg_seed;
	n = h >> cfg_peers;
	b = bpf_map_lookup_elem(&peers6, &n);
	if (!b)
		return 0;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u32 class = READ_ONCE(b->class[i]);

		if (class && READ_ONCE(b->addr[i][0]) == high && READ_ONCE(b->addr[i][1]) == low)
			return class;
	}
	return 0;
}

static __always_inline __u32 class_of(const __u32 *addr, bool v6)
{
	__u32 *c, zero = 0, exact = v6 ? peer6(addr) : peer4(*addr);
	struct state *s;

	if (exact)
		return exact;
	s = bpf_map_lookup_elem(&state, &zero);
	if (!s || !(v6 ? s->cidrs6 : s->cidrs4))
		return WORLD;
	if (v6) {
		struct lpm6 k = {.bits = 128};

		__builtin_memcpy(k.addr, addr, 16);
		c = bpf_map_lookup_elem(&cidr6, &k);
	} else {
		struct lpm4 k = {.bits = 32, .addr = *addr};

		c = bpf_map_lookup_elem(&cidr4, &k);
	}
	return c ? *c : WORLD;
}

/* source_class is the class of a packet's source. Behind an address of the
 * node may be a local pod whose packet was masqueraded. */
static __always_inline __u32 source_class(struct packet *p, bool v6)
{
	__u32 class = class_of(p->src, v6);

	if (class & CLASS_NODE) {
		__u32 id;
		struct endpoint *e = endpoint_of(p->ingress, &id);

		p->judged = 0; /* it depends on more than the flow */
		if (e)
			class = v6 ? e->class6 : e->class4;
	}
	return class;
}

/* look reads row[class], then profile[port]. The bank is read last: a row may
 * name a profile only after the bank that holds it was published. */
static __always_inline __u32 look(struct packet *p, __u64 word, int dir, __u32 class, __u32 proto, __u16 port)
{
	__u32 n, zero = 0, profile, bank;
	struct block *b;
	struct bitmap *m;
	struct state *s;
	__u16 k;

	class &= CLASS_MASK;
	n = class / ROW_CELLS;
	p->class = class;
	p->profile = 0;
	if (n >> ((word >> 40) & 15))
		return P_DENY;
	n += (__u32)(word >> (dir * 20)) & 0xfffff;
	b = bpf_map_lookup_elem(&rows, &n);
	if (!b)
		return P_DENY;
	profile = READ_ONCE(b->cell[class % ROW_CELLS]);
	p->profile = profile;
	if (profile < P_FIRST)
		return profile;
	if (proto > 2)
		return P_DENY;
	s = bpf_map_lookup_elem(&state, &zero);
	if (!s)
		return P_DENY;
	bank = READ_ONCE(s->bank) & 1;
	n = bank * PORT_BLOCKS + proto * 1024 + port / 64;
	b = bpf_map_lookup_elem(&ports, &n);
	if (!b)
		return P_DENY;
	k = READ_ONCE(b->cell[port % 64]);
	n = bank * cfg_profiles + profile;
	m = bpf_map_lookup_elem(&profiles, &n);
	if (!m)
		return P_DENY;
	return m->bits[(k / 8) % BITMAP] >> (k % 8) & 1;
}

static __always_inline __u32 verdict(struct packet *p, __u64 word, int dir, __u32 class, __u32 proto, __u16 port)
{
	if (!(word & W_ISO(dir)))
		return P_ALLOW;
	return look(p, word, dir, class, proto, port);
}

static __always_inline void flow_make(union flow *f, __u32 ifindex, __u8 proto, const __u32 *local, __u16 lport, const __u32 *remote,
				      __u16 rport, bool v6)
{
	__u32 where = ifindex << 8 | proto;

	if (v6) {
		f->v6.where = where;
		__builtin_memcpy(f->v6.local, local, 16);
		__builtin_memcpy(f->v6.remote, remote, 16);
		f->v6.lport = lport;
		f->v6.rport = rport;
	} else {
		f->v4.where = where;
		f->v4.local = *local;
		f->v4.remote = *remote;
		f->v4.lport = lport;
		f->v4.rport = rport;
	}
}

/* flow_of is a packet's flow. out: the pod sends it, its source is local. */
static __always_inline void flow_of(union flow *f, struct packet *p, bool out, bool v6)
{
	if (out)
		flow_make(f, p->ifindex, p->proto, p->src, p->sport, p->dst, p->dport, v6);
	else
		flow_make(f, p->ifindex, p->proto, p->dst, p->dport, p->src, p->sport, v6);
}

static __always_inline struct ct_value *ct_find(union flow *f, bool v6)
{
	return v6 ? bpf_map_lookup_elem(&ct6, &f->v6) : bpf_map_lookup_elem(&ct4, &f->v4);
}

static __always_inline void ct_put(union flow *f, struct ct_value *v, bool v6)
{
	if (v6)
		bpf_map_update_elem(&ct6, &f->v6, v, BPF_ANY);
	else
		bpf_map_update_elem(&ct4, &f->v4, v, BPF_ANY);
}

static __always_inline __u32 ct_seconds(__u32 flags, __u32 proto)
{
	switch (proto) {
	case 6:
	case 132:
		return flags & CT_CLOSING ? 30 : flags & CT_REPLIED ? 21600 : 60;
	case 17:
		return flags & CT_REPLIED ? 180 : 30;
	case 1:
	case 58:
		return 30;
	}
	return 600;
}

/* ct_dead reads the time after what another CPU may set to it meanwhile: the other
 * way round a live flow would look older than anything. */
static __always_inline bool ct_dead(struct ct_value *v, __u32 proto)
{
	__u32 last = READ_ONCE(v->last);

	return (__u32)bpf_jiffies64() - last > ct_seconds(v->flags, proto) * cfg_hz;
}

static __always_inline struct ct_value *ct_alive(union flow *f, bool v6)
{
	struct ct_value *v = ct_find(f, v6);

	return v && !ct_dead(v, f->v4.where & 0xff) ? v : NULL;
}

/* judged notes why policy let a packet pass, for the flow's next ones that go
 * the same way. */
static __always_inline void judged(struct ct_value *v, struct packet *p, int dir, enum reason reason)
{
	if (p->judged && JUDGED(reason))
		WRITE_ONCE(v->passed[dir], p->generation | (reason + 1));
}

/* ct_touch notes that a packet of a known flow went by, opposite to or along
 * with the direction in which it was opened. */
static __always_inline void ct_touch(struct ct_value *v, struct packet *p, bool along)
{
	__u32 now = (__u32)bpf_jiffies64(), flags = v->flags;

	if (!along)
		flags |= CT_REPLIED;
	if (p->proto == 6 && p->tcp & (FIN | RST))
		flags |= CT_CLOSING;
	else if (p->proto == 6 && p->tcp & SYN)
		flags &= ~CT_CLOSING;
	if (flags != v->flags)
		WRITE_ONCE(v->flags, flags);
	if (now - v->last >= cfg_hz)
		WRITE_ONCE(v->last, now);
}

/* track keeps conntrack of a packet that policy allows as such: opened is
 * CT_OUT or CT_IN by the way it goes, with CT_HOST or CT_DEFER. It returns
 * true for a flow that is new. */
static __always_inline bool track(union flow *f, struct packet *p, __u32 opened, enum reason reason, bool v6)
{
	int dir = opened & CT_IN ? IN : OUT;
	struct ct_value *v, n = {};

	if (p->later || p->error)
		return false;
	v = ct_alive(f, v6);
	if (v && !(OPENS(p) && !(v->flags & opened))) {
		bool along = v->flags & opened & (CT_OUT | CT_IN);

		if (opened & CT_DEFER & ~v->flags && v->flags & CT_OUT)
			WRITE_ONCE(v->flags, v->flags | CT_DEFER);
		/* Without TCP's openings, whom policy lets speak first has opened it as well. */
		if (!along && p->proto != 6 && !(v->flags & CT_HOST))
			WRITE_ONCE(v->flags, v->flags | (opened & (CT_OUT | CT_IN)));
		ct_touch(v, p, along);
		judged(v, p, dir, reason);
		return false;
	}
	judged(&n, p, dir, reason);
	n.last = (__u32)bpf_jiffies64();
	n.flags = opened;
	if (p->proto == 6 && !OPENS(p)) {
		/* Picked up midway. Who opened it? Not who acknowledges the opening;
		 * otherwise most likely who has the higher port. */
		bool mine = !(p->tcp & SYN) && p->dport < p->sport;

		n.flags |= CT_REPLIED;
		if (p->tcp & (FIN | RST))
			n.flags |= CT_CLOSING;
		if (!mine && !(opened & CT_HOST))
			n.flags ^= CT_OUT | CT_IN;
	}
	ct_put(f, &n, v6);
	return true;
}

static __noinline int tell(struct packet *p, __u32 what, __u32 endpoint, __u32 len)
{
	__u32 reason = what & 0xff, hook = what >> 8 & 0xff, key = reason & 31, second;
	struct window *w = bpf_map_lookup_elem(&windows, &key);
	struct event e = {};

	if (!w || !p || !cfg_events)
		return 0;
	second = (__u32)bpf_jiffies64() / cfg_hz;
	if (w->second != second) {
		w->second = second;
		w->count = 0;
	}
	if (w->count++ >= cfg_events)
		return 0;
	e.time = bpf_ktime_get_ns();
	e.endpoint = endpoint;
	e.ifindex = p->ifindex;
	e.ingress = p->ingress;
	e.class = p->class;
	e.profile = p->profile;
	__builtin_memcpy(e.src, p->src, 16);
	__builtin_memcpy(e.dst, p->dst, 16);
	e.sport = p->sport;
	e.dport = p->dport;
	e.len = len;
	e.hook = hook;
	e.reason = reason;
	e.proto = p->proto;
	e.flags = what >> 16;
	e.tcp = p->tcp;
	bpf_ringbuf_output(&events, &e, sizeof(e), 0);
	return 0;
}

static __always_inline void count(enum hook hook, enum reason reason, __u32 len)
{
	__u32 key = hook * 32 + reason;
	struct counter *c = bpf_map_lookup_elem(&counters, &key);

	if (c) {
		c->packets++;
		c->bytes += len;
	}
}

/* done counts and tells. fresh: the first packet of a flow. */
static __always_inline int done(struct __sk_buff *skb, struct packet *p, enum hook hook, enum reason reason, __u64 word,
				__u32 endpoint, bool fresh, bool v6)
{
	bool audit = DROPPED(reason) && word & W_AUDIT && word & W_ACTIVE && reason != R_SPOOF;

	if (__builtin_expect(p->dry, 0)) {
		skb->cb[1] = reason;
		skb->cb[2] = p->class;
		skb->cb[3] = p->profile;
		return DROPPED(reason) && !audit ? DROP : ALLOW;
	}
	count(hook, reason, skb->len);
	if (DROPPED(reason) || fresh)
		tell(p, reason | hook << 8 | (v6 | audit << 1 | (DROPPED(reason) && !audit) << 2) << 16, endpoint, skb->len);
	return DROPPED(reason) && !audit ? DROP : ALLOW;
}

static __always_inline bool same(const __u32 *a, const __u32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

/* reply judges a packet that policy does not allow as such: it may answer a
 * flow that the other side was allowed to open. dir is the way the packet goes,
 * class the peer's. */
static __always_inline enum reason reply(union flow *f, struct packet *p, __u64 word, int dir, __u32 class, bool v6)
{
	__u32 opened = dir == IN ? CT_OUT : CT_IN;
	enum reason denied = dir == IN ? R_POLICY_IN : R_POLICY_OUT;
	struct ct_value *ct;

	if (p->error) { /* the packet that it is about went the other way */
		__u32 *local = dir == IN ? p->isrc : p->idst, *remote = dir == IN ? p->idst : p->isrc;
		__u16 lport = dir == IN ? p->isport : p->idport, rport = dir == IN ? p->idport : p->isport;
		union flow g = {};

		flow_make(&g, p->ifindex, p->iproto, local, lport, remote, rport, v6);
		if (ct_alive(&g, v6))
			return R_RELATED;
		/* Unknown, as after a restart: a flow that policy allows, of this pod. */
		if (cfg_strict || !same(local, dir == IN ? p->dst : p->src))
			return denied;
		if (p->iproto == 6 && verdict(p, word, OUT, class_of(remote, v6), p->iport, rport) != P_DENY)
			return R_RELATED;
		return denied;
	}
	ct = ct_alive(f, v6);
	if (ct && !OPENS(p)) {
		if (ct->flags & CT_HOST && dir == OUT) {
			ct_touch(ct, p, false);
			judged(ct, p, dir, R_HOST);
			return R_HOST;
		}
		if (cfg_keep || word & W_DEGRADED) {
			ct_touch(ct, p, ct->flags & (opened ^ (CT_IN | CT_OUT)));
			judged(ct, p, dir, R_REPLY);
			return R_REPLY;
		}
		if (!(ct->flags & opened))
			return R_REVOKED;
		if (!(ct->flags & CT_DEFER) && verdict(p, word, !dir, class, p->port, p->sport) == P_DENY)
			return R_REVOKED;
		ct_touch(ct, p, false);
		judged(ct, p, dir, R_REPLY);
		return R_REPLY;
	}
	if (word & W_DEGRADED)
		return R_DEGRADED;
	if (p->proto != 6 || OPENS(p) || p->later || cfg_strict)
		return denied;
	/* From a service's address (P_DEFER) it is a segment that this node has
	 * translated back: only so can it have come here with that source. */
	if (verdict(p, word, !dir, class, p->port, p->sport) == P_DENY)
		return denied;
	return R_INFERRED;
}

/* infer notes a flow that was taken for the answer to one not known. */
static __always_inline void infer(union flow *f, struct packet *p, int dir, bool v6)
{
	struct ct_value n = {.last = (__u32)bpf_jiffies64(), .flags = (dir == IN ? CT_OUT : CT_IN) | CT_REPLIED};

	if (p->tcp & (FIN | RST))
		n.flags |= CT_CLOSING;
	ct_put(f, &n, v6);
}

static __always_inline int unusual(int parsed)
{
	return parsed == NOT_IP ? R_NOT_IP : parsed == UNKNOWN_FRAGMENT ? R_FRAGMENT : R_MALFORMED;
}

static __always_inline bool link_local(const __u32 *a)
{
	return (a[0] & htonl(0xffc00000)) == htonl(0xfe800000);
}

/* spoofed: a pod sends from its own addresses only; within the link also from
 * its link-local one. */
static __always_inline bool spoofed(struct endpoint *e, __u32 id, struct packet *p, bool v6)
{
	__u32 *owner;

	if (!v6) {
		if (p->src[0] == e->ip4 && e->ip4)
			return false;
		owner = bpf_map_lookup_elem(&ep_ip4, p->src);
	} else {
		__u32 *a = e->ip6;

		if (p->src[0] == a[0] && p->src[1] == a[1] && p->src[2] == a[2] && p->src[3] == a[3] && (a[0] | a[1] | a[2] | a[3]))
			return false;
		if (link_local(p->src) && (link_local(p->dst) || (p->dst[0] & htonl(0xff0f0000)) == htonl(0xff020000)))
			return false;
		owner = bpf_map_lookup_elem(&ep_ip6, p->src);
	}
	return !owner || *owner != id;
}

static __always_inline int from_pod(struct __sk_buff *skb, struct packet *p, int parsed, struct endpoint *e, __u32 id, bool v6)
{
	__u64 word = READ_ONCE(e->word);
	__u32 class, v = P_ALLOW;
	struct ct_value *ct;
	enum reason r;
	union flow f = {};

	if (parsed == NEIGHBOUR)
		return done(skb, p, H_FROM_POD, R_NEIGHBOUR, word, id, false, v6);
	if (parsed != PARSED && (parsed == NOT_IP || parsed == MALFORMED || word & (W_ISO(IN) | W_ISO(OUT)) || !(word & W_ACTIVE)))
		return done(skb, p, H_FROM_POD, unusual(parsed), word, id, false, v6);
	if (spoofed(e, id, p, v6))
		return done(skb, p, H_FROM_POD, R_SPOOF, word, id, false, v6);
	if (parsed != PARSED) /* a fragment of an unknown first, of a pod that is not isolated */
		return done(skb, p, H_FROM_POD, R_OPEN, word, id, false, v6);
	p->judged = !p->dry;
	flow_of(&f, p, true, v6);
	if (!(word & W_ACTIVE)) {
		ct = ct_alive(&f, v6);
		return done(skb, p, H_FROM_POD, ct && ct->flags & CT_HOST ? R_HOST : R_NOT_READY, word, id, false, v6);
	}
	if (!(word & W_ISO(OUT))) {
		bool fresh = !p->dry && track(&f, p, CT_OUT, R_OPEN, v6);

		return done(skb, p, H_FROM_POD, R_OPEN, word, id, fresh, v6);
	}
	class = class_of(p->dst, v6);
	if (!(word & W_DEGRADED)) {
		v = look(p, word, OUT, class, p->port, p->dport);
		if (v == P_ALLOW) {
			bool fresh = !p->dry && track(&f, p, CT_OUT, R_POLICY, v6);

			return done(skb, p, H_FROM_POD, R_POLICY, word, id, fresh, v6);
		}
		if (v == P_DEFER) {
			/* The answer to a flow from that address, or a flow to be judged
			 * where its destination is known. */
			bool fresh;

			ct = ct_alive(&f, v6);
			if (ct && !OPENS(p) && ct->flags & (CT_IN | CT_HOST)) {
				if (!p->dry) {
					ct_touch(ct, p, false);
					judged(ct, p, OUT, R_REPLY);
				}
				return done(skb, p, H_FROM_POD, R_REPLY, word, id, false, v6);
			}
			skb->mark |= cfg_mark;
			fresh = !p->dry && track(&f, p, CT_OUT | CT_DEFER, R_DEFERRED, v6);
			return done(skb, p, H_FROM_POD, R_DEFERRED, word, id, fresh, v6);
		}
	}
	r = reply(&f, p, word, OUT, class, v6);
	if (r == R_INFERRED && !p->dry)
		infer(&f, p, OUT, v6);
	return done(skb, p, H_FROM_POD, r, word, id, false, v6);
}

/* deferred judges egress where the destination is known. */
static __always_inline bool deferred_denied(struct packet *p, __u32 class)
{
	__u32 id;
	struct endpoint *e = endpoint_of(p->ingress, &id);
	__u64 word;

	if (!e)
		return false;
	word = READ_ONCE(e->word);
	if (!(word & W_ISO(OUT)) || word & W_AUDIT)
		return false;
	return look(p, word, OUT, class, p->port, p->dport) != P_ALLOW;
}

static __always_inline int to_pod(struct __sk_buff *skb, struct packet *p, int parsed, struct endpoint *e, __u32 id, bool v6)
{
	__u64 word = READ_ONCE(e->word);
	__u32 class = 0, in = p->ingress;
	bool fresh;
	enum reason r;
	union flow f = {};

	if (parsed == NEIGHBOUR)
		return done(skb, p, H_TO_POD, R_NEIGHBOUR, word, id, false, v6);
	if (parsed == PARSED)
		flow_of(&f, p, false, v6);
	if (in == 0) { /* this host sends it: probes, and whatever the node does */
		if (parsed == PARSED && !p->dry)
			track(&f, p, CT_IN | CT_HOST, R_NEIGHBOUR, v6);
		return done(skb, p, H_TO_POD, R_HOST, word, id, false, v6);
	}
	if (!(word & W_ACTIVE))
		return done(skb, p, H_TO_POD, R_NOT_READY, word, id, false, v6);
	if (in == p->ifindex) /* to itself by way of a service */
		return done(skb, p, H_TO_POD, R_HAIRPIN, word, id, false, v6);
	if (parsed != PARSED) {
		if (word & W_ISO(IN) || skb->mark & cfg_mark)
			return done(skb, p, H_TO_POD, unusual(parsed), word, id, false, v6);
		return done(skb, p, H_TO_POD, R_OPEN, word, id, false, v6);
	}
	p->judged = !p->dry && !(skb->mark & cfg_mark);
	if (skb->mark & cfg_mark) {
		if (deferred_denied(p, v6 ? e->class6 : e->class4))
			return done(skb, p, H_TO_POD, R_DEFERRED_OUT, 0, id, false, v6);
		skb->mark &= ~cfg_mark;
	}
	if (!(word & W_ISO(IN))) {
		fresh = !p->dry && track(&f, p, CT_IN, R_OPEN, v6);
		return done(skb, p, H_TO_POD, R_OPEN, word, id, fresh, v6);
	}
	class = source_class(p, v6);
	if (!(word & W_DEGRADED) && look(p, word, IN, class, p->port, p->dport) == P_ALLOW) {
		fresh = !p->dry && track(&f, p, CT_IN, R_POLICY, v6);
		return done(skb, p, H_TO_POD, R_POLICY, word, id, fresh, v6);
	}
	r = reply(&f, p, word, IN, class, v6);
	if (r == R_INFERRED && !p->dry)
		infer(&f, p, IN, v6);
	return done(skb, p, H_TO_POD, r, word, id, false, v6);
}

static __always_inline bool same_flow(union flow *a, union flow *b, bool v6)
{
	__u64 *x = (__u64 *)a, *y = (__u64 *)b;

	return x[0] == y[0] && x[1] == y[1] && (!v6 || (x[2] == y[2] && x[3] == y[3] && x[4] == y[4] && a->v6.lport == b->v6.lport && a->v6.rport == b->v6.rport));
}

static __always_inline struct known *recent_of(struct recent *r, union flow *f, int dir, bool v6)
{
	__u32 remote = v6 ? f->v6.remote[3] ^ f->v6.local[3] : f->v4.remote ^ f->v4.local;
	__u32 ports = v6 ? (__u32)f->v6.lport << 16 | f->v6.rport : (__u32)f->v4.lport << 16 | f->v4.rport;
	__u64 h = ((__u64)ports << 32 | (remote ^ f->v4.where)) * 0x9e3779b97f4a7c15;

	return &r->flows[dir][(h ^ h >> 32) >> 20 & (RECENT - 1)];
}

/* pass_known passes a packet of a flow, not an opening, whose direction was
 * judged already by the tables as they are. */
static __always_inline bool pass_known(struct __sk_buff *skb, struct packet *p, union flow *f, bool out, bool v6)
{
	int dir = out ? OUT : IN;
	__u32 zero = 0, now = (__u32)bpf_jiffies64(), *g, reason;
	struct ct_value *v;
	struct recent *r;
	struct known *k;

	g = bpf_map_lookup_elem(&generation, &zero);
	r = bpf_map_lookup_elem(&recent, &zero);
	if (!g || !r)
		return false;
	k = recent_of(r, f, dir, v6);
	if (k->passed >> REASON_BITS == (READ_ONCE(*g) << REASON_BITS) >> REASON_BITS && (__s32)(k->until - now) > 0 && k->v6 == v6 &&
	    !(p->tcp & (SYN | FIN | RST)) && same_flow(&k->flow, f, v6)) {
		reason = (k->passed & ((1 << REASON_BITS) - 1)) - 1;
	} else {
		__u32 passed;

		v = ct_find(f, v6);
		if (!v)
			return false;
		passed = READ_ONCE(v->passed[dir]);
		if (passed >> REASON_BITS != (READ_ONCE(*g) << REASON_BITS) >> REASON_BITS || ct_dead(v, p->proto))
			return false;
		ct_touch(v, p, v->flags & (out ? CT_OUT : CT_IN));
		k->flow = *f;
		k->v6 = v6;
		k->passed = passed;
		k->until = now + cfg_hz;
		reason = (passed & ((1 << REASON_BITS) - 1)) - 1;
	}
	reason &= 7;
	r->counters[dir][reason].packets++;
	r->counters[dir][reason].bytes += skb->len;
	return true;
}

/* known is most packets' way: what one costs beside a busy stack is the memory
 * and the code that it touches. */
static __always_inline bool known(struct __sk_buff *skb, bool out)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct eth_ip4 *h = data;
	union flow f = {};
	struct packet p;
	__u8 *ports;

	if (READ_ONCE(skb->cb[0]) == DRY32 || data + 42 > end)
		return false;
	p.ifindex = READ_ONCE(skb->ifindex);
	p.ingress = READ_ONCE(skb->ingress_ifindex);
	if (!out && (p.ingress == 0 || p.ingress == p.ifindex || (skb->mark && skb->mark & cfg_mark)))
		return false;
	if (h->proto == htons(ETH_P_IP)) {
		if (h->ihl_version != 0x45 || h->frag_off & htons(0x3fff))
			return false;
		p.proto = h->protocol;
		ports = data + 34;
	} else if (h->proto == htons(ETH_P_IPV6)) {
		if (data + 62 > end)
			return false;
		p.proto = ((struct eth_ip6 *)data)->nexthdr;
		ports = data + 54;
	} else {
		return false;
	}
	p.tcp = 0;
	if (p.proto == 6) {
		if ((void *)ports + 20 > end)
			return false;
		p.tcp = ports[13];
	} else if (p.proto != 17) {
		return false;
	}
	p.sport = (__u16)ports[0] << 8 | ports[1];
	p.dport = (__u16)ports[2] << 8 | ports[3];
	if (OPENS(&p))
		return false;
	if (h->proto == htons(ETH_P_IP)) {
		p.src[0] = h->saddr;
		p.dst[0] = h->daddr;
		flow_of(&f, &p, out, false);
		return pass_known(skb, &p, &f, out, false);
	}
	__builtin_memcpy(p.src, ((struct eth_ip6 *)data)->saddr, 16);
	__builtin_memcpy(p.dst, ((struct eth_ip6 *)data)->daddr, 16);
	flow_of(&f, &p, out, true);
	return pass_known(skb, &p, &f, out, true);
}

static __noinline int judge(struct __sk_buff *skb, bool out)
{
	struct packet p;
	__u32 id = 0;
	struct endpoint *e;
	__u16 type = ethertype(skb);
	int parsed = NOT_IP;

	start(skb, &p);
	if (type == ETH_P_ARP)
		return ALLOW;
	e = endpoint_of(p.ifindex, &id);
	if (!e) {
		if (!out && p.ingress == 0)
			return ALLOW;
		return done(skb, &p, out ? H_FROM_POD : H_TO_POD, R_NOT_READY, 0, 0, false, false);
	}
	if (type == ETH_P_IPV6) {
		parsed = parse6(skb, &p);
		return out ? from_pod(skb, &p, parsed, e, id, true) : to_pod(skb, &p, parsed, e, id, true);
	}
	if (type == ETH_P_IP)
		parsed = parse4(skb, &p);
	return out ? from_pod(skb, &p, parsed, e, id, false) : to_pod(skb, &p, parsed, e, id, false);
}

SEC("tc")
int na_from_pod(struct __sk_buff *skb)
{
	return known(skb, true) ? ALLOW : judge(skb, true);
}

SEC("tc")
int na_to_pod(struct __sk_buff *skb)
{
	return known(skb, false) ? ALLOW : judge(skb, false);
}

SEC("tc")
int na_uplink_out(struct __sk_buff *skb)
{
	struct packet p;
	__u16 type;
	int parsed;
	bool v6;

	if (!(skb->mark & cfg_mark))
		return ALLOW;
	start(skb, &p);
	type = ethertype(skb);
	v6 = type == ETH_P_IPV6;
	parsed = v6 ? parse6(skb, &p) : type == ETH_P_IP ? parse4(skb, &p) : NOT_IP;
	if (parsed == NEIGHBOUR || type == ETH_P_ARP)
		return ALLOW;
	skb->mark &= ~cfg_mark;
	if (parsed != PARSED || deferred_denied(&p, v6 ? class_of(p.dst, true) : class_of(p.dst, false)))
		return done(skb, &p, H_UPLINK_OUT, R_DEFERRED_OUT, 0, 0, false, v6);
	return done(skb, &p, H_UPLINK_OUT, R_POLICY, 0, 0, false, v6);
}

/* early says whether na_to_pod will drop an opening from outside. It finds the
 * endpoint's number only then. */
static __always_inline bool early(struct packet *p, bool v6, __u32 *endpoint)
{
	__u32 *id = v6 ? bpf_map_lookup_elem(&ep_ip6, p->dst) : bpf_map_lookup_elem(&ep_ip4, p->dst);
	struct endpoint *e = id ? bpf_map_lookup_elem(&endpoints, id) : NULL;
	__u32 class;
	__u64 word;

	if (!e)
		return false;
	word = READ_ONCE(e->word);
	if (!(word & W_ISO(IN)) || !(word & W_ACTIVE) || word & (W_AUDIT | W_DEGRADED))
		return false;
	class = class_of(p->src, v6);
	if (class & CLASS_NODE || look(p, word, IN, class, p->port, p->dport) != P_DENY)
		return false;
	*endpoint = *id;
	return true;
}

static __always_inline int uplink_in(struct __sk_buff *skb, struct packet *p, bool v6)
{
	__u32 id = 0;

	return early(p, v6, &id) ? done(skb, p, H_UPLINK_IN, R_EARLY, 0, id, false, v6) : ALLOW;
}

/* Only openings of TCP connections: nothing else can be told from an answer
 * here, where services are not translated back yet. */
SEC("tc")
int na_uplink_in(struct __sk_buff *skb)
{
	struct packet p;
	__u16 type = ethertype(skb);

	start(skb, &p);
	if (type == ETH_P_IP) {
		if (parse4(skb, &p) != PARSED || p.later || !OPENS(&p))
			return ALLOW;
		return uplink_in(skb, &p, false);
	}
	if (type == ETH_P_IPV6) {
		if (parse6(skb, &p) != PARSED || p.later || !OPENS(&p))
			return ALLOW;
		return uplink_in(skb, &p, true);
	}
	return ALLOW;
}

static __always_inline bool opening(struct packet *p, void *tcp, void *end)
{
	__u8 *b = tcp;

	if (tcp + 14 > end)
		return false;
	p->tcp = b[13];
	p->sport = (__u16)b[0] << 8 | b[1];
	p->dport = (__u16)b[2] << 8 | b[3];
	return OPENS(p);
}

static __always_inline int xdp_judge(struct packet *p, bool v6, __u32 len)
{
	__u32 id = 0;

	if (!early(p, v6, &id))
		return XDP_PASS;
	count(H_XDP, R_EARLY, len);
	tell(p, R_EARLY | H_XDP << 8 | (v6 | 4) << 16, id, len);
	return XDP_DROP;
}

/* What is not plain (fragments, extension headers, VLAN tags) goes on to
 * na_uplink_in and na_to_pod. */
SEC("xdp")
int na_xdp(struct xdp_md *x)
{
	void *data = (void *)(long)x->data, *end = (void *)(long)x->data_end;
	struct eth_ip4 *h = data;
	struct packet p;

	if (data + 54 > end)
		return XDP_PASS;
	__builtin_memset(&p, 0, sizeof(p));
	p.ifindex = READ_ONCE(x->ingress_ifindex);
	p.proto = 6;
	if (h->proto == htons(ETH_P_IP)) {
		if (h->protocol != 6 || h->ihl_version < 0x45 || h->ihl_version > 0x4f || ntohs(h->frag_off) & 0x3fff)
			return XDP_PASS;
		if (!opening(&p, data + 14 + (h->ihl_version & 15) * 4, end))
			return XDP_PASS;
		p.src[0] = h->saddr;
		p.dst[0] = h->daddr;
		return xdp_judge(&p, false, end - data);
	}
	if (h->proto == htons(ETH_P_IPV6)) {
		struct eth_ip6 *h6 = data;

		if (h6->nexthdr != 6 || !opening(&p, data + 54, end))
			return XDP_PASS;
		__builtin_memcpy(p.src, h6->saddr, 16);
		__builtin_memcpy(p.dst, h6->daddr, 16);
		return xdp_judge(&p, true, end - data);
	}
	return XDP_PASS;
}

/* Run by the loader with keys of conntrack behind 16 bytes of header: deletes
 * those whose flows are dead, looking at them once more: a packet may have come
 * by since the loader did. Returns how many went. */
#define COLLECT 64 /* keys a run */
#define COLLECT_V6 1
#define COLLECT_ANY 2 /* dead or not: the interface is gone */

SEC("tc")
int na_collect(struct __sk_buff *skb)
{
	__u32 mode = skb->mark, size = mode & COLLECT_V6 ? sizeof(struct ct6) : sizeof(struct ct4);
	int gone = 0;

	for (int i = 0; i < COLLECT; i++) {
		union flow f = {};
		struct ct_value *v;
		bool v6 = mode & COLLECT_V6;

		if (v6 ? bpf_skb_load_bytes(skb, 16 + i * size, &f.v6, sizeof(f.v6)) : bpf_skb_load_bytes(skb, 16 + i * size, &f.v4, sizeof(f.v4)))
			break;
		v = ct_find(&f, v6);
		if (!v || (!(mode & COLLECT_ANY) && !ct_dead(v, f.v4.where & 0xff)))
			continue;
		gone += v6 ? !bpf_map_delete_elem(&ct6, &f.v6) : !bpf_map_delete_elem(&ct4, &f.v4);
	}
	return gone;
}

/* Run by the loader: the clock that the programs read. All 32 bits: jiffies
 * begin five minutes before they wrap (INITIAL_JIFFIES, linux/jiffies.h), so
 * the highest is set on a host that has just booted. */
SEC("tc")
int na_clock(struct __sk_buff *skb)
{
	return (__u32)bpf_jiffies64();
}
