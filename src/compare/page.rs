pub fn html(_: &super::report::Report) -> String { String::new() }
