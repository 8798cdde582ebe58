//! The wire's words in the device room's: the two rooms do not know each other.
use devices::limiter;
use devices::virtio::block;
use kvm::cpuid::Template;
use wire::machine::{Access, CacheMode, CpuTemplate, RateLimits, TokenBucket};

pub(crate) fn template(template: &CpuTemplate) -> Template {
    match template {
        CpuTemplate::Host => Template::Host,
        CpuTemplate::X86_64V2 => Template::X86_64V2,
        CpuTemplate::X86_64V3 => Template::X86_64V3,
        CpuTemplate::Features(names) => Template::Features(names.clone()),
    }
}

pub(super) fn limits(limits: RateLimits) -> limiter::RateLimits {
    let bucket = |TokenBucket { per_second, burst }| limiter::TokenBucket { per_second, burst };
    limiter::RateLimits { bandwidth: limits.bandwidth.map(bucket), operations: limits.operations.map(bucket) }
}

pub(super) fn access(access: Access) -> block::Access {
    match access {
        Access::ReadOnly => block::Access::ReadOnly,
        Access::ReadWrite => block::Access::ReadWrite,
    }
}

pub(super) fn cache(cache: CacheMode) -> block::CacheMode {
    match cache {
        CacheMode::Writeback => block::CacheMode::Writeback,
        CacheMode::Writethrough => block::CacheMode::Writethrough,
    }
}
