use super::*;

#[test]
fn a_thread_that_works_uses_cpu_time() {
    let before = cpu_time_ns(id()).unwrap();
    let mut sum = 0u64;
    while cpu_time_ns(id()).unwrap() == before {
        sum = std::hint::black_box(sum.wrapping_add(1));
    }
    assert!(cpu_time_ns(id()).unwrap() > before);
}

#[test]
fn a_thread_that_is_not_ours_has_no_time_here() {
    for thread in [i32::MIN, -1, 0, PID_LIMIT - 1, i32::MAX] {
        assert!(cpu_time_ns(thread).is_err(), "{thread}");
    }
}

#[test]
fn a_name_is_cut_to_what_the_kernel_keeps() {
    set_name("a-name-that-is-too-long");
    let comm = std::fs::read_to_string(format!("/proc/self/task/{}/comm", id())).unwrap();
    assert_eq!(comm, "a-name-that-is-\n");
}
