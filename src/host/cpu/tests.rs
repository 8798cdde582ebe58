use wire::launch::ShownCpu;

use super::*;

fn names(list: &str) -> BTreeSet<String> {
    list.split_ascii_whitespace().map(str::to_owned).collect()
}

/// A processor of this vendor that has these features, of which `level` makes x86-64-v2.
fn cpu(vendor: &str, features: &str, level: Option<&str>) -> Cpu {
    let mut shown = vec![ShownCpu { template: machine::CpuTemplate::Host, features: names(features) }];
    shown.extend(
        level.map(|level| ShownCpu { template: machine::CpuTemplate::X86_64V2, features: names(level) }),
    );
    Cpu(CpuReport { vendor: vendor.to_owned(), shown, ..CpuReport::default() })
}

fn listed(list: &str) -> CpuTemplate {
    CpuTemplate::Features(names(list))
}

#[test]
fn a_guest_that_goes_on_needs_what_it_was_shown_and_the_same_vendor() {
    let (old, new) = (cpu("A", "lm avx", Some("lm")), cpu("A", "lm avx avx2", Some("lm")));
    let other = cpu("B", "lm avx avx2", Some("lm"));
    let host = CpuTemplate::Host;
    assert_eq!(new.misses(&old.offered(&host, None, None), false), None);
    let told = old.misses(&new.offered(&host, None, None), false).unwrap();
    assert!(told.contains("lacks avx2, which the guest was shown"), "{told}");
    // It came from an older one, and goes back.
    assert_eq!(old.misses(&new.offered(&host, Some(names("lm avx")), None), false), None);
    assert_eq!(old.misses(&new.offered(&CpuTemplate::X86_64V2, None, None), false), None);
    assert_eq!(old.misses(&new.offered(&listed("lm avx"), None, None), false), None);
    for template in [host, CpuTemplate::X86_64V2, listed("lm")] {
        let told = other.misses(&old.offered(&template, None, None), false).unwrap();
        assert!(told.contains("runs on a A processor and this host has one of B"), "{told}");
    }
}

#[test]
fn a_server_that_begins_anew_needs_what_its_cpu_asks_for() {
    let (here, poor) = (cpu("B", "lm sse4_2", Some("lm sse4_2")), cpu("B", "lm", None));
    let from = cpu("A", "lm sse4_2 aes", Some("lm sse4_2"));
    for template in [CpuTemplate::Host, CpuTemplate::X86_64V2, listed("lm sse4_2")] {
        assert_eq!(here.misses(&from.offered(&template, None, None), true), None, "{template:?}");
    }
    let misses = |template| poor.misses(&from.offered(&template, None, None), true);
    assert_eq!(misses(CpuTemplate::Host), None);
    assert!(misses(CpuTemplate::X86_64V2).unwrap().contains("a feature of that level"));
    assert!(misses(listed("lm aes")).unwrap().contains("lacks aes, which the server's cpu asks for"));
}

#[test]
fn where_nothing_is_known_nothing_is_judged() {
    let here = cpu("A", "lm", None);
    let offered = here.offered(&CpuTemplate::Host, None, None);
    assert_eq!(Cpu::default().misses(&offered, false), None);
    assert_eq!(here.misses(&Cpu::default().offered(&CpuTemplate::Host, None, None), false), None);
}

fn host(name: &str, vendor: &str, features: &str, protections: &str) -> HostCpu {
    HostCpu {
        name: name.to_owned(),
        vendor: vendor.to_owned(),
        model: String::new(),
        features: names(features),
        protections: names(protections),
    }
}

#[test]
fn a_baseline_is_what_all_have_and_says_what_it_hides() {
    let hosts = vec![
        host("a", "A", "lm avx smep md_clear", "smep md_clear"),
        host("b", "A", "lm avx avx2 smep", "smep"),
        host("c", "A", "lm avx smep aes", "smep"),
    ];
    let made = baseline(ComputeCpuBaseline { hosts }).unwrap();
    assert_eq!((made.cpu, made.vendor.as_str()), (listed("avx lm smep"), "A"));
    let hidden: Vec<_> =
        made.hidden.iter().map(|one| (&*one.host, &one.features, &one.protections)).collect();
    let (none, md_clear) = (names(""), names("md_clear"));
    assert_eq!(
        hidden,
        [("a", &md_clear, &md_clear), ("b", &names("avx2"), &none), ("c", &names("aes"), &none)]
    );
}

#[test]
fn what_makes_no_baseline_is_refused_where_it_stands() {
    let many = |count: usize| vec![host("a", "A", "lm", ""); count];
    let cases = [
        (many(0), "/hosts"),
        (many(BASELINE_HOSTS_MAX + 1), "/hosts"),
        (vec![host("a", "A", "lm", ""), host("b", "B", "lm", "")], "/hosts/1/vendor"),
        (vec![host("a", "A", "lm", ""), host("b", "A", "", "")], "/hosts/1/features"),
        (vec![host("a", "A", "LM", "")], "/hosts/0/features"),
        (vec![host("a", "A", "lm", "sm\u{e9}p")], "/hosts/0/protections"),
        (vec![host("a", "A", "lm", "smep")], "/hosts/0/protections"),
        (vec![host("a", "A", "lm", ""), host("b", "A", "avx", "")], "/hosts"),
    ];
    for (hosts, pointer) in cases {
        let refused = baseline(ComputeCpuBaseline { hosts }).unwrap_err();
        assert_eq!((refused.code, refused.errors[0].pointer.as_str()), (Code::Invalid, pointer));
    }
    assert!(baseline(ComputeCpuBaseline { hosts: many(BASELINE_HOSTS_MAX) }).is_ok());
}

#[test]
fn a_clock_fits_that_is_as_fast_within_what_kvm_tolerates_or_can_be_made_to_look_so() {
    let (fixed, scaled) =
        (Clock { khz: Some(2_000_000), can_scale: false }, Clock { khz: Some(2_000_000), can_scale: true });
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
