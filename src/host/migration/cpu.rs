//! The processor as its kernel describes it, and what a guest from another host may miss here. It reads one file.
use std::collections::BTreeSet;

use wire::launch::KvmReport;
use wire::machine::CpuTemplate;
use wire::peer::OfferedCpu;

use crate::error::{Error, Result};

/// Features of x86-64-v2 beyond every 64-bit processor's, as Linux names them.
const V2: [&str; 7] = ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"];

/// Features of x86-64-v3 beyond those of v2.
const V3: [&str; 9] = ["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"];

/// A processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cpu {
    pub(super) vendor: String,
    pub(super) features: BTreeSet<String>,
}

impl Cpu {
    /// This host's.
    pub(super) fn of_host() -> Result<Cpu> {
        let text = std::fs::read_to_string("/proc/cpuinfo")
            .map_err(|cause| Error::internal("the host's processor cannot be looked at", cause))?;
        Ok(Cpu::parse(&text))
    }

    /// The first processor of `/proc/cpuinfo`: a host's are alike.
    fn parse(text: &str) -> Cpu {
        let value = |name: &str| {
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .find_map(|(key, value)| (key.trim() == name).then(|| value.trim()))
                .unwrap_or_default()
        };
        Cpu {
            vendor: value("vendor_id").to_owned(),
            features: value("flags").split_ascii_whitespace().map(str::to_owned).collect(),
        }
    }

    /// What is missing here for a guest from there. With the template `host` that is whatever the other processor
    /// has: nobody keeps a list of what the guest found and uses.
    pub(super) fn misses(&self, offered: &OfferedCpu) -> Option<String> {
        let wanted: Vec<&str> = match offered.template {
            CpuTemplate::Host => offered.features.iter().map(String::as_str).collect(),
            CpuTemplate::X86_64V2 => V2.to_vec(),
            CpuTemplate::X86_64V3 => [V2.as_slice(), V3.as_slice()].concat(),
        };
        if offered.template == CpuTemplate::Host && offered.vendor != self.vendor {
            return Some(format!(
                "the server uses all of a {} processor and this host has one of {}; give it the cpu `x86_64_v2` or \
                 `x86_64_v3` and start it anew, or choose another target",
                offered.vendor, self.vendor
            ));
        }
        let missing: Vec<&str> = wanted.into_iter().filter(|name| !self.features.contains(*name)).collect();
        (!missing.is_empty()).then(|| {
            format!(
                "this host's processor lacks {}, which the guest may use; choose another target, or give the server \
                 a lesser cpu and start it anew",
                missing.join(", ")
            )
        })
    }
}

/// By how many millionths two counters differ at most that are of the same speed: what Linux's KVM takes for one
/// (`tsc_tolerance_ppm`), and a VMM that restores a processor does.
const TSC_TOLERANCE_PPM: u64 = 250;

/// How fast the time stamp counter runs that guests see here. A guest measures it once and tells the time by it from then on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Clock {
    /// In thousands of ticks a second, where that is known.
    pub(super) khz: Option<u32>,
    /// Whether the processor can show another speed.
    pub(super) can_scale: bool,
}

impl Clock {
    pub(super) fn of(report: &KvmReport) -> Clock {
        let can_scale = report.extensions.iter().any(|(name, value)| name == "TSC_CONTROL" && *value > 0);
        Clock { khz: report.tsc_khz, can_scale }
    }

    /// What is wrong with it for a guest whose counter ran at this speed.
    pub(super) fn misfits(&self, guest_khz: Option<u32>) -> Option<String> {
        let (guest_khz, here_khz) = (guest_khz?, self.khz?);
        let apart = u64::from(guest_khz.abs_diff(here_khz)).saturating_mul(1_000_000);
        let is_same = apart <= u64::from(here_khz).saturating_mul(TSC_TOLERANCE_PPM);
        // One that is slower than the guest's is made to catch up by KVM; one that is faster nobody can slow down.
        (!is_same && !self.can_scale && guest_khz < here_khz).then(|| {
            format!(
                "the guest's time stamp counter runs at {guest_khz} kHz, this host's at {here_khz} kHz, and its processor \
                 cannot scale it; choose another target, or shut the server down and move it while it is off"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(vendor: &str, features: &str) -> Cpu {
        Cpu::parse(&format!("processor : 0\nvendor_id\t: {vendor}\nflags\t\t: {features}\n\nprocessor : 1\n"))
    }

    fn offered(template: CpuTemplate, cpu: &Cpu) -> OfferedCpu {
        OfferedCpu {
            template,
            vendor: cpu.vendor.clone(),
            features: cpu.features.iter().cloned().collect(),
            tsc_khz: None,
        }
    }

    #[test]
    fn a_guest_of_all_features_needs_each_and_the_same_vendor() {
        let (old, new) = (cpu("A", "sse4_2 avx"), cpu("A", "sse4_2 avx avx2"));
        assert_eq!(new.misses(&offered(CpuTemplate::Host, &old)), None);
        assert!(old.misses(&offered(CpuTemplate::Host, &new)).unwrap().contains("lacks avx2,"));
        let other = cpu("B", "sse4_2 avx avx2");
        assert!(other.misses(&offered(CpuTemplate::Host, &old)).unwrap().contains("processor and this host"));
    }

    #[test]
    fn a_clock_fits_that_is_as_fast_within_what_kvm_tolerates_or_can_be_made_to_look_so() {
        let (fixed, scaled) = (
            Clock { khz: Some(2_000_000), can_scale: false },
            Clock { khz: Some(2_000_000), can_scale: true },
        );
        for guest_khz in [1_999_500, 2_000_000, 2_000_500, 3_000_000] {
            assert_eq!(fixed.misfits(Some(guest_khz)), None, "{guest_khz}");
        }
        for guest_khz in [1_999_499, 1_000_000] {
            let told = fixed.misfits(Some(guest_khz)).unwrap();
            assert!(told.contains(&format!("{guest_khz} kHz, this host's at 2000000 kHz")), "{told}");
            assert_eq!(scaled.misfits(Some(guest_khz)), None);
        }
        assert_eq!((fixed.misfits(None), Clock::default().misfits(Some(1))), (None, None));
    }

    #[test]
    fn a_guest_of_a_level_needs_that_level_of_any_vendor() {
        let v2 = cpu("A", &V2.join(" "));
        let v3 = cpu("B", &[V2.join(" "), V3.join(" ")].join(" "));
        assert_eq!(v2.misses(&offered(CpuTemplate::X86_64V2, &v3)), None);
        assert!(v2.misses(&offered(CpuTemplate::X86_64V3, &v3)).unwrap().contains("avx2"));
        assert_eq!(v3.misses(&offered(CpuTemplate::X86_64V3, &v2)), None);
    }
}
